"""Attribution of a narrowed model's loss to its structures: integrated gradients on the path from the dense model.

A trial run prunes every structure of every layer, on few tokens. A structure's narrow matrix, with zeros where its
columns are gone, is reached from the dense one on a straight line ``W + alpha (W' - W)``, all structures at once; with
``D(alpha)`` the divergence of the model's predictions from the dense model's, ``D(1)`` is the sum over structures of
the integrals of ``<dD/dW, W' - W>`` over ``alpha`` (the fundamental theorem of calculus; Aumann and Shapley's
attribution of a cost). The forward and the backward pass run layer by layer, with saved inputs, so that a model that
does not fit into memory can be measured too. Several processes divide the windows: the trial run sums up its Gram
matrices, and of the way back only every structure's contribution, a number, is summed up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.capture import capture, put_parameter
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, running_layer
from slimgpt.layerwise.divergence import kl_and_cross_entropy, on_device
from slimgpt.layerwise.passes import LayerPasses, LayerVariant
from slimgpt.models.architecture import HEADS, Structure
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.families.moe import Experts
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.modeling_slim import skip_attention
from slimgpt.models.slicing import output_matrix, unit_rows
from slimgpt.planning.allocation import ATTENTION, Sensitivity, StructureCost
from slimgpt.planning.plan import Plan
from slimgpt.pruning.layer import matrix_of
from slimgpt.pruning.loop import prune_layers
from slimgpt.pruning.report import units_of
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import DEVICE, malloc_trim
from slimgpt.sensitivity.attention import AttentionRemoval
from slimgpt.sensitivity.windows import split_windows

T = TypeVar("T")

Points = tuple[tuple[float, float], ...]
"""Quadrature nodes ``(alpha, weight)`` on the path from dense to narrow; weight 0 evaluates the KL only."""

MIDPOINT: Points = ((0.5, 1.0),)
"""The midpoint rule, exact where the divergence grows with the square of the distance."""

SIMPSON: Points = ((0.5, 2 / 3), (1.0, 1 / 6))
"""Simpson's rule, used by a search; the gradient at the dense model is zero."""

ENDPOINT: Points = ((1.0, 0.0),)
"""The end of the path, where the divergence is that of the narrowed model."""

OnMeasured = Callable[[int, int, float], None]
"""Called after every step with its number, the number of all steps and the seconds it took."""


@dataclass
class PrunedWeight:
    """A structure after the trial run: the kept columns, ``(keep,)`` or ``(experts, keep)``, and the number of its
    matrix, or stack of matrices, in the activation store."""

    structure: Structure
    columns: Tensor
    number: int


@dataclass
class PathVariant(LayerVariant):
    """A layer at a node of the path.

    Args:
        steps: ``W' - W`` of each of ``weights``, from the dense matrix to the narrow one.
        node_weight: the weight of the node's gradients.
    """

    steps: list[Tensor]
    node_weight: float


def measure(
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    run: ExecutionContext,
    on_measured: OnMeasured | None = None,
    *,
    points: Points = MIDPOINT + ENDPOINT,
    whole_attention: Collection[int] = (),
) -> Sensitivity:
    """The loss of a plan, and its attribution to structures.

    Args:
        model: gives embeddings, final norm and LM head; unchanged.
        load_layer: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)`` long, the same in all processes; predictions are compared on the last ones.
        plan: the widths to try; structures that it leaves as they are contribute nothing and are not in the result.
        run: its processes divide the windows, of which there are enough (see :mod:`slimgpt.sensitivity.windows`).
        points: :data:`MIDPOINT` gives the contributions, :data:`ENDPOINT` the divergence; without it, their sum.
        whole_attention: layers whose attention is also taken out of the narrowed model, one at a time, which gives
            contributions of the unit ``attention``.

    Returns:
        The same in every process.

    Raises:
        NumericalError: NaN or infinity on the way, or a Hessian that is not positive definite.
    """
    measurement = _Measurement(
        model, load_layer, plan, config, run, on_measured, points=points, whole_attention=whole_attention
    )
    return measurement(windows)


class _Measurement:
    """One trial run, and the forward and backward pass over the layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        load_layer: Callable[[int], nn.Module],
        plan: Plan,
        config: PruneConfig,
        run: ExecutionContext,
        on_measured: OnMeasured | None,
        *,
        points: Points,
        whole_attention: Collection[int] = (),
    ):
        self.model, self.layers, self.load_layer = model, decoder_layers(model), load_layer
        self.plan, self.config = plan, config
        architecture = architecture_of(model.config, model)
        self.structures, self.attention = architecture.chosen(plan.head_unit), architecture.attention
        self.whole_attention = whole_attention
        self.sizes = layer_sizes(model.config)
        self.run, self.on_measured, self.done, self.points = run, on_measured if run.ranks.main else None, 0, points
        self.narrow: list[list[PrunedWeight]] = []

    def __call__(self, windows: Tensor) -> Sensitivity:
        fit, probe = split_windows(windows, max(max(layer.values()) for layer in self.sizes))
        itemsize = next(self.model.get_input_embeddings().parameters()).element_size()
        self.matrices = activation_store_for(self.run, itemsize * self._narrow_numbers())
        self._trial_prune(self.run.ranks.share(fit))
        self.tokens = max(probe.shape[0] * (probe.shape[1] - 1), 1)
        own, half = self.run.ranks.rows(len(probe)), -(-len(probe) // (2 * self.config.batch_size))
        # The windows of the first half of all batches that this process has, whatever the number of processes.
        first_half = max(min(half * self.config.batch_size, own.stop) - own.start, 0)
        probe = self.run.ranks.share(probe)
        hidden = ActivationStore(DEVICE, self.run.device)
        stream = capture(self.model, self.layers, probe, self.config.batch_size, hidden, self.run.dtype)
        batches = range(len(stream))
        inputs = {number: hidden.get(number) for number in batches} if self.whole_attention else {}
        passes = LayerPasses(self._variants, stream.arguments, batches, self.run)
        paths = [hidden, *(ActivationStore(DEVICE, self.run.device) for _ in self.points)]
        for path in paths[1:]:
            for number in batches:
                path.put(number, hidden.get(number))
        differentiated = [path for path, (_, weight) in enumerate(self.points, 1) if weight]
        for _ in self._steps(passes.forward(paths, differentiated, checked=batches)):
            pass
        passes.check_finite()
        with on_device(self.model, self.run.device):
            kl, gradients = self._compare(paths, probe, passes.tuple_length)
        contributions = tuple(self._costs(passes, gradients)) if gradients else ()
        divergence = kl if ENDPOINT[0] in self.points else sum(each.cost for each in contributions)
        if self.whole_attention:
            contributions += self._attention_costs(inputs, hidden, passes, probe[:first_half])
        return Sensitivity(divergence, contributions)

    def _trial_prune(self, fit: Tensor) -> None:
        """Prune on a few windows and save every narrow matrix."""
        count = 0
        for finished in self._steps(prune_layers(self.model, self.load_layer, fit, self.plan, self.config, self.run)):
            index, sizes, weights = finished.report.layer, self.sizes[finished.report.layer], []
            for structure in self.structures:
                if isinstance(structure, Experts):
                    if finished.report.experts is not None and finished.report.experts.channels:
                        masks = finished.report.experts.channels
                        columns = torch.tensor([units_of(mask) for mask in masks])  # (experts, keep)
                        weights.append(PrunedWeight(structure, columns, count))
                        down = finished.state[structure.key]
                        self.matrices.put(count, (down.mT if structure.transposed else down).contiguous())
                        count += 1
                    continue
                kept = finished.report.kept.get(structure.name)
                if not kept or len(kept) == structure.units(sizes):
                    continue
                W = output_matrix(finished.state, structure)
                n = W.shape[1] * structure.units(sizes) // len(kept)
                columns = unit_rows(n, structure.units(sizes), torch.tensor(kept))
                weights.append(PrunedWeight(structure, columns, count))
                self.matrices.put(count, W)
                count += 1
            assert index == len(self.narrow)
            self.narrow.append(weights)

    def _compare(
        self, paths: list[ActivationStore], probe: Tensor, tuple_length: int
    ) -> tuple[float, dict[int, list[Tensor]]]:
        """``KL(dense || narrowed)`` per token at the last node, and the gradients of its sum at all that need them."""
        total = 0.0
        with_gradient = [bool(weight) for _, weight in self.points]
        gradients: dict[int, list[Tensor]] = {path: [] for path, needed in enumerate(with_gradient, 1) if needed}
        for number, ids in enumerate(probe.split(self.config.batch_size)):
            dense, *narrowed = (path.get(number) for path in paths)
            kls, _, batch_gradients = kl_and_cross_entropy(
                self.model, dense, narrowed, ids, tuple_length, with_gradient
            )
            total += float(kls[-1])
            for path in gradients:
                gradients[path].append(batch_gradients[path - 1])
        (total,) = self.run.ranks.sums([total])
        return total / self.tokens, gradients

    def _costs(self, passes: LayerPasses[PathVariant], gradients: dict[int, list[Tensor]]) -> list[StructureCost]:
        """The contribution of every structure to the divergence."""
        structures: list[tuple[int, PrunedWeight]] = []
        contributions: list[float] = []
        for index, layer_gradients in self._steps(passes.backward(gradients)):
            costs = [0.0] * len(self.narrow[index])
            for variant, weight_gradients in layer_gradients:
                for position, (gradient, step) in enumerate(zip(weight_gradients, variant.steps)):
                    costs[position] += variant.node_weight * float((gradient.to(step) * step).sum()) / self.tokens
            structures += [(index, narrow) for narrow in self.narrow[index]]
            contributions += costs
        # Each is linear in the gradients, so that numbers are summed up and no gradients.
        summed = [
            self._cost(*where, cost) for where, cost in zip(structures, self.run.ranks.sums(contributions), strict=True)
        ]
        return sorted(summed, key=lambda cost: (cost.layer, cost.unit))

    def _cost(self, index: int, narrow: PrunedWeight, cost: float) -> StructureCost:
        structure, sizes = narrow.structure, self.sizes[index]
        removed = 1 - structure.units(self.plan.layers[index]) / structure.units(sizes)
        return StructureCost(index, structure.unit, removed, cost)

    def _attention_costs(
        self,
        inputs: Mapping[int, Tensor],
        dense: ActivationStore,
        passes: LayerPasses[PathVariant],
        probe: Tensor,
    ) -> tuple[StructureCost, ...]:
        """The cost of each whole attention, on half of the text.

        Args:
            inputs: the hidden states in front of the first layer by batch.
            dense: the dense model's behind the last layer.
            probe: the windows of that half that this process has, perhaps none; they come first in the batches.
        """
        batches = probe.split(self.config.batch_size) if len(probe) else ()
        all_batches = range(len(batches))
        removal = AttentionRemoval(
            self._narrow_layer, self.attention, self.whole_attention, passes.arguments, all_batches, self.run
        )
        for _ in self._steps(removal.forward(inputs) if batches else ()):
            pass
        costs = removal.costs(self.model, dense, batches, passes.tuple_length)
        return tuple(StructureCost(layer, ATTENTION, 1.0, cost) for layer, cost in costs.items())

    def _narrow_layer(self, index: int) -> nn.Module:
        """The layer at the end of the path."""
        layer = self._layer(index)
        for name, step in self._path_steps(layer, index).items():
            W = layer.get_parameter(name)
            put_parameter(layer, name, nn.Parameter((W + step).to(W.dtype), requires_grad=False))
        return layer

    def _variants(self, index: int, paths: Sequence[int]) -> Iterator[PathVariant]:
        """The layer on some paths: the dense one on path 0, and that of node ``k`` on path ``k + 1``."""
        layer = self._layer(index)
        if 0 in paths:
            yield PathVariant(layer, [], [], 0.0)
        if not self.plan.layers[index][HEADS] and self.sizes[index][HEADS]:  # a plan that is tried, at the end alone
            skip_attention(layer, self.attention)
        steps = self._path_steps(layer, index)
        dense = {name: layer.get_parameter(name).detach() for name in steps}
        for path in filter(None, paths):
            alpha, node_weight = self.points[path - 1]
            weights: dict[str, Tensor] = {
                name: nn.Parameter((W + alpha * steps[name]).to(W.dtype)) for name, W in dense.items()
            }
            for name, W in weights.items():
                put_parameter(layer, name, W)
            yield PathVariant(layer, list(weights.values()), list(steps.values()), node_weight)

    def _path_steps(self, layer: nn.Module, index: int) -> dict[str, Tensor]:
        """``W' - W`` by the name of the matrix, from the dense layer to the narrow one."""
        steps = {}
        for narrow in self.narrow[index]:
            structure, columns = narrow.structure, narrow.columns
            if isinstance(structure, Experts):
                W = layer.get_parameter(structure.key).detach()
                W = W.mT if structure.transposed else W  # (experts, hidden, width)
            else:
                W, _ = matrix_of(layer, structure)
            full = torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))
            kept = self.matrices.get(narrow.number).to(full)
            places = columns.to(W.device).unsqueeze(-2).expand(kept.shape)
            step = full.scatter_(-1, places, kept).sub_(W)
            steps[structure.key] = step.mT.contiguous() if structure.transposed else step
        return steps

    def _layer(self, index: int) -> nn.Module:
        layer = running_layer(self.load_layer(index), self.model.config, index, self.run)
        for name, tensor in layer.named_parameters():  # those of the model itself may be trained later
            put_parameter(layer, name, nn.Parameter(tensor.detach(), requires_grad=False))
        return layer

    def _narrow_numbers(self) -> int:
        """Number of elements of all output matrices."""
        states = (layer.state_dict() for layer in self.layers)
        return sum(state[s.key].numel() for state in states for s in self.structures if s.key in state)

    def _steps(self, items: Iterable[T]) -> Iterator[T]:
        """Report after every item."""
        start = time.perf_counter()
        for item in items:
            yield item
            del item
            malloc_trim()
            if self.on_measured:
                passes = _passes(self.points) + bool(self.whole_attention)
                self.on_measured(self.done, passes * len(self.layers), time.perf_counter() - start)
            self.done, start = self.done + 1, time.perf_counter()


def _passes(points: Points) -> int:
    """Passes over all layers: the trial run, forward, and backward if any node has gradients."""
    return 3 if num_gradient_nodes(points) else 2


def num_gradient_nodes(points: Points) -> int:
    """Number of nodes with gradients."""
    return sum(1 for _, weight in points if weight)
