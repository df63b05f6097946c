"""What each structure has lost of a narrowed model's quality: gradients along the path from the dense model to it.

A trial run prunes every structure of every layer, on few tokens. A structure's narrow matrix, with zeros where its
columns are gone, is reached from the dense one on a straight line ``W + alpha (W' - W)``, all structures at once; with
``D(alpha)`` the divergence of the model's predictions from the dense model's, ``D(1)`` is the sum over structures of
the integrals of ``<dD/dW, W' - W>`` over ``alpha`` (the fundamental theorem of calculus; Aumann and Shapley's way to
divide a cost). Layers are visited in order, forth and back, with their inputs kept in between, so that a model that
does not fit into memory can be measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.capture import LayerInputs, capture, put_parameter, run_layer
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, check_output, running_layer
from slimgpt.layerwise.divergence import kl_and_cross_entropy, on_device, returns_tuple
from slimgpt.models.architecture import Structure
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.slicing import output_matrix, unit_rows
from slimgpt.planning.allocation import Sensitivity, StructureCost
from slimgpt.planning.plan import Plan
from slimgpt.pruning.layer import matrix_of
from slimgpt.pruning.loop import prune_layers
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import DEVICE, malloc_trim

T = TypeVar("T")

Points = tuple[tuple[float, float], ...]
"""Points ``alpha`` of the path and what gradients there weigh; where that is nothing, none are taken."""

PARTS: Points = ((0.5, 1.0),)
"""The midpoint rule, exact where the divergence grows with the square of the distance."""

SIMPSON: Points = ((0.5, 2 / 3), (1.0, 1 / 6))
"""What a search measures, by Simpson's rule; at the dense model there is no gradient."""

ENDPOINT: Points = ((1.0, 0.0),)
"""The end of the path, where the divergence is that of the narrowed model."""

PROBE_TOKENS, PROBE_LENGTH = 4096, 512
"""Tokens whose predictions are compared, and the longest window of them."""

FIT_TOKENS, FIT_PER_COLUMN = 8192, 4
"""The trial run sees so many tokens, or so many per column of the widest matrix where that is more."""

OnMeasured = Callable[[int, int, float], None]
"""Called after every step with its number, the number of all steps and the seconds it took."""


@dataclass
class PrunedWeight:
    """Where the trial run left a structure: the columns that stay and the number its matrix has on the shelf."""

    structure: Structure
    columns: Tensor
    number: int


def measure(
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    run: ExecutionContext,
    on_measured: OnMeasured | None = None,
    points: Points = PARTS + ENDPOINT,
) -> Sensitivity:
    """What a plan would lose, and each structure's part in it.

    Args:
        model: what is around the layers; it stays as it is.
        load_layer: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)`` long; the last ones are the ones whose predictions are compared.
        plan: the widths to try; structures that it leaves as they are contribute nothing and are not in the result.
        points: with :data:`PARTS` the result has the parts, with :data:`ENDPOINT` what they sum up to is measured, too;
            else it is their sum.

    Raises:
        NumericalError: NaN or infinity on the way, or a Hessian that is not positive definite.
    """
    return _Measurement(model, load_layer, plan, config, run, on_measured, points)(windows)


def divide(windows: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    """The windows for the trial run, and the (shorter) ones whose predictions are compared: never the same."""
    length = min(windows.shape[1], PROBE_LENGTH)
    count = min(max(PROBE_TOKENS // length, 1), max(len(windows) // 2, 1))
    tokens = max(FIT_TOKENS, FIT_PER_COLUMN * widest)
    most = -(-tokens // windows.shape[1])
    rest = windows[:-count] if len(windows) > count else windows
    return rest[:most], windows[-count:, :length]


class _Measurement:
    """One trial run and the way forth and back through the layers."""

    def __init__(
        self,
        model: PreTrainedModel,
        load_layer: Callable[[int], nn.Module],
        plan: Plan,
        config: PruneConfig,
        run: ExecutionContext,
        on_measured: OnMeasured | None,
        points: Points,
    ):
        self.model, self.layers, self.load_layer = model, decoder_layers(model), load_layer
        self.plan, self.config = plan, config
        self.structures = architecture_of(model.config, model).chosen(plan.head_unit)
        self.sizes = layer_sizes(model.config)
        self.run = run.single_process(run.dtype)
        self.on_measured, self.done, self.points = on_measured, 0, points
        self.narrow: list[list[PrunedWeight]] = []

    def __call__(self, windows: Tensor) -> Sensitivity:
        fit, probe = divide(windows, max(max(layer.values()) for layer in self.sizes))
        each = next(self.model.get_input_embeddings().parameters()).element_size()
        self.matrices = activation_store_for(self.run, each * self._narrow_numbers())
        self._try(fit)
        stream = capture(
            self.model,
            self.layers,
            probe,
            self.config.batch_size,
            ActivationStore(DEVICE, self.run.device),
            self.run.dtype,
        )
        dense, ends = self._forth(stream)
        with on_device(self.model, self.run.device):
            found, gradients = self._compare(dense, ends, probe)
        parts = tuple(self._back(stream, gradients)) if num_gradient_nodes(self.points) else ()
        return Sensitivity(found if ENDPOINT[0] in self.points else sum(part.cost for part in parts), parts)

    def _try(self, fit: Tensor) -> None:
        """Prune on a few windows and keep every narrow matrix."""
        count = 0
        for finished in self._steps(prune_layers(self.model, self.load_layer, fit, self.plan, self.config, self.run)):
            index, sizes, found = finished.report.layer, self.sizes[finished.report.layer], []
            for structure in self.structures:
                kept = finished.report.kept.get(structure.name)
                if kept is None or len(kept) == structure.units(sizes):
                    continue
                W = output_matrix(finished.state, structure)
                n = W.shape[1] * structure.units(sizes) // len(kept)
                found.append(PrunedWeight(structure, unit_rows(n, structure.units(sizes), torch.tensor(kept)), count))
                self.matrices.put(count, W)
                count += 1
            assert index == len(self.narrow)
            self.narrow.append(found)

    @torch.no_grad()
    def _forth(self, stream: LayerInputs) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The hidden states behind the last layer of the dense model and at every point of the path; by batch."""
        batches = range(len(stream))
        dense = [stream.hidden.take(number) for number in batches]
        ends = [list(dense) for _ in self.points]
        inputs = len(self.layers) * sum(hidden.numel() * hidden.element_size() for hidden in dense)
        inputs *= num_gradient_nodes(self.points)
        self.inputs = activation_store_for(self.run, inputs)
        for index in self._steps(range(len(self.layers))):
            layer = self._layer(index)
            if index == 0:
                self.tuples = returns_tuple(layer, dense[0], stream.arguments[0][0])
            dense = [run_layer(layer, dense[number], stream.arguments[number][index]) for number in batches]
            for point, _, _ in self._narrowed(layer, index):
                for number in batches:
                    if self.points[point][1]:
                        self.inputs.put(self._number(point, index, number, len(batches)), ends[point][number])
                    ends[point][number] = run_layer(layer, ends[point][number], stream.arguments[number][index])
            for hidden in (*dense, *ends[-1]):
                check_output(index, hidden)
        return dense, ends

    def _compare(
        self, dense: list[Tensor], ends: list[list[Tensor]], probe: Tensor
    ) -> tuple[float, list[list[Tensor]]]:
        """``KL(dense || narrowed)`` per token at the last point of the path, and the gradients of its sum at all."""
        total, gradients = 0.0, [list(path) for path in ends]
        wanted = [bool(weight) for _, weight in self.points]
        for number, ids in enumerate(probe.split(self.config.batch_size)):
            here = [path[number] for path in ends]
            found, _, slopes = kl_and_cross_entropy(self.model, dense[number], here, ids, self.tuples, wanted)
            total += found[-1]
            for point, slope in enumerate(slopes):
                gradients[point][number] = slope
        self.tokens = max(probe.shape[0] * (probe.shape[1] - 1), 1)
        return total / self.tokens, gradients

    def _back(self, stream: LayerInputs, gradients: list[list[Tensor]]) -> list[StructureCost]:
        """The part of every structure in the divergence."""
        parts: list[StructureCost] = []
        batches = range(len(stream))
        for index in self._steps(reversed(range(len(self.layers)))):
            layer = self._layer(index)
            costs = [0.0] * len(self.narrow[index])
            for point, weights, steps in self._narrowed(layer, index, weighted=True):
                for number in batches:
                    hidden = self.inputs.take(self._number(point, index, number, len(batches))).detach()
                    hidden.requires_grad_()
                    with torch.enable_grad():
                        after = run_layer(layer, hidden, stream.arguments[number][index])
                    found = torch.autograd.grad(after, [hidden, *weights], gradients[point][number])
                    gradients[point][number] = found[0]
                    for place, (gradient, step) in enumerate(zip(found[1:], steps)):
                        costs[place] += self.points[point][1] * float((gradient.to(step) * step).sum()) / self.tokens
            for narrow, cost in zip(self.narrow[index], costs):
                structure, sizes = narrow.structure, self.sizes[index]
                removed = 1 - structure.units(self.plan.layers[index]) / structure.units(sizes)
                parts.append(StructureCost(index, structure.unit, removed, cost))
        return sorted(parts, key=lambda part: (part.layer, part.unit))

    def _narrowed(
        self, layer: nn.Module, index: int, weighted: bool = False
    ) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
        """The layer at every point of the path: its number, the matrices there, and the whole way ``W' - W``.

        Args:
            weighted: only at points where gradients are wanted.
        """
        steps = []
        for narrow in self.narrow[index]:
            W, _ = matrix_of(layer, narrow.structure)
            full = torch.zeros_like(W, dtype=torch.promote_types(W.dtype, torch.float32))
            full[:, narrow.columns.to(W.device)] = self.matrices.get(narrow.number).to(full)
            step = full.sub_(W)
            steps.append(step.T.contiguous() if narrow.structure.transposed else step)
        names = [narrow.structure.key for narrow in self.narrow[index]]
        dense = [layer.get_parameter(name).detach() for name in names]
        for point, (alpha, weight) in enumerate(self.points):
            if weighted and not weight:
                continue
            there: list[Tensor] = [nn.Parameter((W + alpha * step).to(W.dtype)) for W, step in zip(dense, steps)]
            for name, W in zip(names, there):
                put_parameter(layer, name, W)
            yield point, there, steps

    def _layer(self, index: int) -> nn.Module:
        layer = running_layer(self.load_layer(index), self.model.config, index, self.run)
        for name, tensor in layer.named_parameters():  # those of the model itself may be trained later
            put_parameter(layer, name, nn.Parameter(tensor.detach(), requires_grad=False))
        return layer

    def _number(self, point: int, index: int, number: int, batches: int) -> int:
        return (point * len(self.layers) + index) * batches + number

    def _narrow_numbers(self) -> int:
        """How many numbers all narrow matrices hold."""
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
                self.on_measured(self.done, _passes(self.points) * len(self.layers), time.perf_counter() - start)
            self.done, start = self.done + 1, time.perf_counter()


def _passes(points: Points) -> int:
    """How often all layers are visited: for the trial run, forth, and back if gradients are wanted."""
    return 3 if num_gradient_nodes(points) else 2


def num_gradient_nodes(points: Points) -> int:
    """At how many points gradients are wanted."""
    return sum(1 for _, weight in points if weight)
