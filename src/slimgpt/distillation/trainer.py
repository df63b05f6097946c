"""Training of the pruned model on the calibration text, for the errors that the repair of single matrices cannot reach.

The repair solves every output matrix for itself, and errors of one layer go on through all others. Here the same
matrices, those of all layers, and the layers' norms are moved together towards what the dense model predicts and the
text says: a few dozen steps of Adam, every token seen once. In a mixture those are the output matrices of all experts,
and the routers are moved with them: experts that are narrower, or have fewer neighbours, deserve other tokens. A longer
training, as in a search, begins with text that the dense model writes, and moves all other matrices, too. Layers are
visited in order, forth and back, with their inputs kept in between and each layer's weights moved as soon as its
gradient is known, so that one layer at a time has to be on the device. Several processes divide the windows of every
step; each owns a share of every matrix's rows with Adam's moments of them (ZeRO stage 1, arXiv 1910.02054), and the
gradients of a layer are summed up while the layer in front of it is run.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.distillation.captured_steps import CapturedSteps, StepInputs
from slimgpt.distillation.data import DistillationData, training_run
from slimgpt.distillation.losses import Losses
from slimgpt.distillation.routers import leave_unseen, of_router
from slimgpt.distillation.schedule import learning_rate
from slimgpt.distillation.sharded_adam import ShardedAdam
from slimgpt.layerwise.capture import put_parameter
from slimgpt.layerwise.context import ExecutionContext, check_finite_flags, running_layer
from slimgpt.layerwise.divergence import kl_and_cross_entropy, on_device
from slimgpt.layerwise.passes import LayerPasses, LayerVariant
from slimgpt.losses.chunked import sum_dtype
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.families.moe import Experts
from slimgpt.models.slicing import State
from slimgpt.planning.plan import Plan
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import DEVICE, malloc_trim, used_bytes
from slimgpt.runtime.thresholds import thresholds

TEXT_WEIGHT = 1.0
"""Weight of the cross-entropy on the text relative to the KL. It is scaled by min(1, sqrt(KL at start)): cross-entropy
is larger than KL and would dominate. 0 for generated text, which comes first."""

OnReached = Callable[[State], None]
"""Called from time to time with what a killed training goes on from; see :class:`Distillation`."""

OnDistilled = Callable[[int, int, float, float], None]
"""Called after every step with its number, the number of all steps, the divergence per token and the seconds."""


class Distillation:
    """The training of a pruned model.

    Args:
        model: gives embeddings, final norm and LM head; unchanged.
        load_layer: gives the pruned layer of an index; unchanged.
        plan: its widths.
        data: the result of :func:`build_distillation_data`.
        run: the context of the pruning.
        resume_state: state that the run being resumed passed to ``on_reached``: the losses before, the divergence of
            every step, and the parameters with Adam's moments by number. Only the first process's is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        load_layer: Callable[[int], nn.Module],
        plan: Plan,
        data: DistillationData,
        run: ExecutionContext,
        resume_state: State | None = None,
    ):
        self.model, self.load_layer, self.plan, self.data, self.resume_state = (
            model,
            load_layer,
            plan,
            data,
            resume_state,
        )
        self.run = training_run(model, run)
        self.ranks = self.run.ranks
        self.architecture = architecture_of(model.config, model)
        chosen = self.architecture.chosen(plan.head_unit)
        self.keys = {structure.key for structure in chosen}  # of output matrices
        self.experts = next((structure for structure in chosen if isinstance(structure, Experts)), None)
        self.names: list[dict[str, int]] = []  # of every layer's trained parameters, with their numbers in the stores
        self.types: list[torch.dtype] = []
        self.resident_layers: dict[int, nn.Module] = {}  # layers that the device has room for

    def __call__(self, on_distilled: OnDistilled | None = None, on_reached: OnReached | None = None) -> dict[str, Any]:
        """Train, and say what it gave, per token; ``kept`` is whether the losses on the held-out text fell.

        Raises:
            NumericalError: NaN or infinity behind a layer.
        """
        start = saved = time.perf_counter()
        self._begin()
        steps, held_out = self.data.steps, range(self.data.held_out)
        with on_device(self.model, self.run.device, self.run.dtype):
            resumed = self.ranks.agree(int(bool(self.resume_state)))
            before, curve = self._resume() if resumed else (self.evaluate(held_out), [])
            # A divergence is like the square of a distance, so steps are scaled by its root.
            lr_scale = math.sqrt(min(max(before.kl, 0.0), 1.0))
            max_lr, text_weight = thresholds().max_lr * lr_scale, TEXT_WEIGHT * lr_scale
            captured = CapturedSteps(self.run, self.step, self._why_not_captured)
            for number, batches in list(enumerate(steps))[self.adam.steps :]:
                began = time.perf_counter()
                step_text_weight = text_weight if number >= self.data.generated_steps else 0.0
                self.adam.begin_step(max_lr * learning_rate(number, len(steps)))
                figures, finite = captured(self._inputs(batches), step_text_weight)
                self.adam.steps += 1
                check_finite_flags(range(len(finite)), finite)
                losses = Losses.of(figures)
                curve.append(losses.kl)
                malloc_trim()
                if on_distilled and self.ranks.main:
                    on_distilled(number, len(steps), losses.kl, time.perf_counter() - began)
                due = time.perf_counter() - saved > thresholds().save_interval_s and number + 1 < len(steps)
                if on_reached and self.ranks.agree(int(due)):
                    state = self._state(before, curve)
                    if self.ranks.main:
                        on_reached(state)
                    del state
                    saved = time.perf_counter()
            del captured
            self._round_to_stored_dtype()
            after = self.evaluate(held_out)
        return {
            "tokens": self.data.tokens["trained"],
            "written_tokens": self.data.tokens["generated"],
            "steps": len(steps),
            "rate": max_lr,
            "held_out_tokens": self.data.tokens["held_out"],
            "text_weight": text_weight,
            "divergence": {"before": before.kl, "after": after.kl},
            "cross_entropy": {"before": before.cross_entropy, "after": after.cross_entropy},
            "curve": curve,
            "kept": after.loss(text_weight) < before.loss(text_weight),
            "seconds": time.perf_counter() - start,
        }

    def _round_to_stored_dtype(self) -> None:
        """Round the trained weights to the dtype they are saved in, so that the evaluation is of the saved model."""
        for number, dtype in enumerate(self.types):
            if dtype != torch.float32:
                weight = self.weights.get(number)
                self.weights.put(number, weight.to(dtype).to(weight))

    def parameters(self, index: int) -> State:
        """The trained parameters of a layer by name, on the CPU, in the type they were stored in."""
        return {
            name: self.weights.get(number).to("cpu", self.types[number]) for name, number in self.names[index].items()
        }

    def apply(self, model: PreTrainedModel) -> None:
        """Put the trained parameters into a pruned model that is in memory."""
        for index, layer in enumerate(decoder_layers(model)):
            for name, trained in self.parameters(index).items():
                layer.get_parameter(name).data.copy_(trained)

    def _begin(self) -> None:
        """Copy the trained parameters to the stores in fp32: single steps are below the resolution of 16 bits."""
        trained = [self._trained(self.load_layer(index)) for index in range(len(self.plan.layers))]
        count = sum(parameter.numel() for named in trained for parameter, _ in named.values())
        self.adam = ShardedAdam(self.run, count)
        self.weights = self.adam.weights
        for named in trained:
            self.names.append({name: self.adam.add(*each) for name, each in named.items()})
            self.types += [parameter.dtype for parameter, _ in named.values()]
            malloc_trim()
        self.ids = [ids.to(self.run.device) for ids in self.data.ids]
        used = used_bytes(self.run.device)
        self.resident_limit = used + max(self.run.placement.budget - used, 0) // 3

    def _state(self, before: Losses, curve: list[float]) -> State:
        """The state that a killed training resumes from; whole in the first process."""
        figures = {"before": before, "curve": curve}
        tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in figures.items()}
        return {**self.adam.state(), **tensors}

    def _resume(self) -> tuple[Losses, list[float]]:
        """Restore the state of the run being resumed, whatever the number of its processes was."""
        state = self.resume_state or {}
        steps = self.ranks.agree(len(state["curve"]) if self.ranks.main else 0)
        self.adam.restore(state, steps)
        figures = [*state["before"].tolist(), *state["curve"].tolist()] if self.ranks.main else [0.0] * (2 + steps)
        kl, cross_entropy, *curve = self.ranks.sums(figures)  # of zeros and the first process's
        self.resume_state = None
        return Losses(kl, cross_entropy), curve

    def _trained(self, layer: nn.Module) -> dict[str, tuple[nn.Parameter, float]]:
        """The parameters of a layer that are trained, by name, and the share of the rate that is theirs: output
        matrices, what scales or shifts a norm, the router of experts, and perhaps all other matrices."""
        norms = [name for name, module in layer.named_modules() if "norm" in type(module).__name__.lower()]
        trained = {}
        for name, parameter in layer.named_parameters():
            first = name in self.keys or name.rpartition(".")[0] in norms or of_router(name, parameter, self.experts)
            # A key's bias has no gradient but rounding, and Adam makes a full step of that.
            share = 1.0 if first else self.data.other_matrices_lr if parameter.ndim > 1 else 0.0
            if share:
                trained[name] = (parameter, share)
        return trained

    def _layer(self, index: int) -> nn.Module:
        """A layer with the weights it has by now, of which gradients can be taken."""
        layer = self.resident_layers.get(index)
        if layer is None:
            layer = running_layer(self.load_layer(index), self.model.config, index, self.run, self.plan.layers[index])
            if used_bytes(self.run.device) < self.resident_limit:
                self.resident_layers[index] = layer
        for name, parameter in layer.named_parameters():
            number = self.names[index].get(name)
            weight = parameter.detach() if number is None else self.weights.get(number).to(parameter.dtype)
            put_parameter(layer, name, nn.Parameter(weight, requires_grad=number is not None))
        return layer

    def _variants(self, index: int, _paths: Sequence[int]) -> Iterator[LayerVariant]:
        layer = self._layer(index)
        yield LayerVariant(layer, [layer.get_parameter(name) for name in self.names[index]])

    def _inputs(self, batches: Sequence[int]) -> StepInputs:
        """The tensors of some batches, on the device."""
        hidden, dense = self.data.inputs.hidden, self.data.dense_hidden
        return StepInputs(
            [hidden.get(number) for number in batches],
            [dense.get(number) for number in batches],
            [self.ids[number] for number in batches],
            [self.data.inputs.arguments[number] for number in batches],
        )

    def _passes(self, inputs: StepInputs) -> LayerPasses[LayerVariant]:
        batches, count = range(len(inputs.ids)), len(self.plan.layers)
        return LayerPasses(self._variants, inputs.arguments, batches, self.run, save_graphs=True, num_layers=count)

    def evaluate(self, batches: Sequence[int]) -> Losses:
        inputs = self._inputs(batches)
        passes = self._passes(inputs)
        hidden = self.forward(passes, inputs)
        passes.check_finite()
        return Losses.of(self._compare(inputs, hidden)[0])

    def step(self, inputs: StepInputs, text: float) -> tuple[Tensor, list[Tensor]]:
        """One step of all layers; nothing in it waits for the device.

        Args:
            text: weight of the cross-entropy.

        Returns:
            What :meth:`Losses.of` takes, and whether the hidden states behind every layer were finite, ``()`` bool.
        """
        passes = self._passes(inputs)
        hidden = self.forward(passes, inputs, save_for_backward=True)
        figures, gradients = self._compare(inputs, hidden, text)
        self.backward(passes, gradients)
        return figures, [flag for _, flag in passes.finite]

    def _why_not_captured(self) -> str | None:
        """Why the steps cannot be graphs that a GPU replays; ``None`` if they can."""
        if self.ranks.world > 1:
            return "several processes share it"
        if self.experts is not None:
            return "which experts run is decided on the way"
        if self.architecture.by_batch:
            return "its layers read something that differs by text beside the hidden states"
        if len(self.resident_layers) < len(self.plan.layers) or self.adam.place != DEVICE:
            return "its weights and moments do not all fit on the device"
        return None

    def forward(
        self, passes: LayerPasses[LayerVariant], inputs: StepInputs, save_for_backward: bool = False
    ) -> ActivationStore:
        """The hidden states of some batches behind the last layer, by number of the batch."""
        hidden, batches = ActivationStore(DEVICE, self.run.device), passes.batches
        for number in batches:
            hidden.put(number, inputs.hidden[number])
        for _ in passes.forward([hidden], [0] if save_for_backward else [], checked=batches[-1:]):
            pass
        return hidden

    def _compare(
        self, inputs: StepInputs, hidden: ActivationStore, text: float | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The sums that :meth:`Losses.of` takes, of some batches and those of the other processes, and the gradients
        behind the last layer.

        Args:
            text: its weight in the gradients; ``None``: these are not computed, and zero.
        """
        device, gradients = self.run.device, []
        figures = torch.zeros(4, dtype=sum_dtype(device), device=device)
        for number, ids in enumerate(inputs.ids):
            kls, cross_entropies, gradient = kl_and_cross_entropy(
                self.model,
                inputs.dense[number],
                [hidden.get(number)],
                ids,
                self.data.tuple_length,
                [text is not None],
                text or 0.0,
            )
            figures[:1] += kls
            figures[1:2] += cross_entropies
            figures[2] += ids[:, 1:].numel()
            figures[3] += ids[:, 2:].numel()
            gradients += gradient
        self.ranks.total(figures)
        return figures, gradients

    def backward(self, passes: LayerPasses[LayerVariant], gradients: list[Tensor]) -> None:
        """One step of Adam for every layer from the last to the first, as soon as its gradients are known."""
        started: deque[tuple[int, Callable[[], list[Tensor]]]] = deque()
        for index, layer_gradients in passes.backward({0: gradients}):
            numbers = list(self.names[index].values())
            started.append((index, self.adam.start_sum(numbers, _sums(layer_gradients))))
            while len(started) > (self.ranks.world > 1):  # sums go on while the next layer is run
                self.layer_step(*started.popleft())
        for index, summed in started:
            self.layer_step(index, summed)

    def layer_step(self, index: int, summed: Callable[[], list[Tensor]]) -> None:
        """One step of Adam for the trained parameters of a layer.

        Args:
            summed: gives the gradients of the rows that this process owns.
        """
        named = dict(zip(self.names[index], summed(), strict=True))
        if self.experts is not None:
            leave_unseen(named, self.experts)
        self.adam.step(list(self.names[index].values()), list(named.values()))


def _sums(layer_gradients: Iterable[tuple[LayerVariant, list[Tensor]]]) -> list[Tensor]:
    """The gradients of a layer's weights, summed over batches in fp32."""
    totals: list[Tensor] = []
    for _, weight_gradients in layer_gradients:
        sums = totals or [0.0] * len(weight_gradients)
        totals = [total + gradient.float() for total, gradient in zip(sums, weight_gradients)]
    return totals
