"""What the repair of single matrices cannot reach: a short training of the pruned model on the calibration text.

The repair solves every output matrix for itself, and errors of one layer go on through all others. Here the same
matrices, those of all layers, and the layers' norms are moved together towards what the dense model predicts and the
text says: a few dozen steps of Adam, every token seen once. A longer training, as in a search, begins with text that
the dense model writes, and moves all other matrices, too. Layers are visited in order, forth and back, with their
inputs kept in between and each layer's weights moved as soon as its gradient is known, so that one layer at a time
has to be on the device.

A step moves a matrix by a share of its own root mean square, as Adafactor does (arXiv 1804.04235, section 8), so one
rate serves models whose weights differ in scale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.errors import UsageError
from slimgpt.models.heterogeneous import architecture_of, decoder_layers, layer_sizes, text_config
from slimgpt.models.shape import ModelShape
from slimgpt.models.slicing import State
from slimgpt.planning.plan import Plan
from slimgpt.pruning.capture import Arguments, Stream, capture, put_parameter, run_layer
from slimgpt.pruning.memory import DEVICE, Shelf, trim, used_bytes
from slimgpt.pruning.predictions import brought, divergences, returns_tuple
from slimgpt.pruning.sensitivity import measurable
from slimgpt.pruning.sequential import Run, check_output, running_layer, shelf_for
from slimgpt.pruning.writing import Written, write

BACK = 4 / 3
"""What the way back costs, in forward passes: gradients of what goes into every matrix, and a third of it for those of
the output matrices."""

WRITING = 1.5
"""What a token costs that the dense model writes, in forward passes: one, and its predictions. It is not read again."""


class _Effort(NamedTuple):
    """How much is trained.

    Args:
        passes: so many forward passes of the dense layers over the calibration tokens the training may cost.
        steps: about so many, of at least ``STEP_TOKENS`` tokens.
        others: the rate of all other matrices than the output ones, as a share of theirs; 0: they stay. They would
            take most of the memory, and learn little from few tokens.
    """

    passes: float
    steps: int
    others: float

    def learning(self, plan: Plan) -> float:
        """What a token that is there costs, in forward passes of the dense layers: one, and the way through the pruned
        layers and back."""
        return 1 + (1 + (2 if self.others else BACK)) * (1 - plan.achieved)


USUAL, SEARCH = _Effort(1.4, 64, 0.0), _Effort(11.5, 320, 0.25)
"""By default, and with ``--allocation search``."""

LEAST_TOKENS = 32768
"""So many calibration tokens there must be for a training that nobody asked for."""

HELD_TOKENS = 2048
"""So many tokens are neither repaired nor trained on: the training is kept only if its losses fell there."""

LENGTH = 256
"""Longer windows are cut."""

STEP_TOKENS = 512
"""A step has at least so many tokens."""

RATE, WARMUP = 2.6e-3, 0.1
"""How far a step moves a matrix at most, as a share of its root mean square and for a divergence of one nat, and the
share of steps until then. A divergence is like the square of a distance, so its root is what steps are scaled by."""

BETAS = (0.9, 0.95)
"""Adam's memory of the mean and of the square of the gradient."""

TEXT = 1.0
"""Weight of the text's own cross-entropy beside the divergence, where that is a nat or more at first. Below, it shrinks
as the rate does: what the text says is the larger surprise, and would drown what the dense model says. Text that the
dense model has written comes first and has no such weight: it says nothing that the model's predictions do not."""

OnRehearsed = Callable[[str, int, int, float], None]
"""Called after every step of what comes before the training, with what is done, the step's number, the number of all
such steps, and the seconds."""

KEPT_EVERY = 600.0
"""So many seconds may pass before what a training has reached is kept once more."""

OnReached = Callable[[State], None]
"""Called from time to time with what a killed training goes on from; see :class:`Distillation`."""

OnDistilled = Callable[[int, int, float, float], None]
"""Called after every step with its number, the number of all steps, the divergence per token and the seconds."""


@dataclass
class Lesson:
    """Text, and what the dense model makes of it.

    Args:
        ids: the tokens of every batch, ``(batch, seq_len)``.
        held: so many batches, the first ones, are not trained on.
        written: so many behind them are what the dense model wrote.
        per_step: how many that are trained on make a step.
        others: see :class:`_Effort`.
        stream: the inputs of the first layer, and how to call each.
        dense: the hidden states behind the dense model's last layer, by batch.
        tuples: see :func:`slimgpt.pruning.predictions.returns_tuple`.
    """

    ids: Sequence[Tensor]
    held: int
    written: int
    per_step: int
    others: float
    stream: Stream
    dense: Shelf
    tuples: bool

    @property
    def steps(self) -> list[range]:
        """The numbers of the batches of every step; none has both text that was written and text that was given."""
        found, count = [], len(self.ids)
        for first, last in ((self.held, self.held + self.written), (self.held + self.written, count)):
            starts = range(first, last, self.per_step)
            found += [range(start, min(start + self.per_step, last)) for start in starts]
        return found

    def count(self, numbers: Iterable[int]) -> int:
        """How many tokens some batches have."""
        return sum(self.ids[number].numel() for number in numbers)


def passes_to_distill(config: PruneConfig, plan: Plan, windows: Tensor, tokens: int) -> float:
    """What the training costs, heads left out, in forward passes of the dense layers over one token: one over every
    token that is there, the writing of those that are not, and the way forth and back through the pruned layers."""
    return tokens * _effort(config).learning(plan) + max(tokens - _room(windows), 0) * (WRITING - 1)


def tokens_to_distill(config: PruneConfig, shape: ModelShape, plan: Plan, windows: Tensor) -> int:
    """On how many tokens a pruned model is trained; 0: not at all. If they are more than there are, the dense model
    writes the others.

    Raises:
        UsageError: it was asked for and cannot be done.
    """
    if config.distill == 0:
        return 0
    if config.distill == "auto":
        if not measurable(shape) or windows.numel() < LEAST_TOKENS:
            return 0
        effort, room = _effort(config), _room(windows)
        passes, learning = effort.passes * windows.numel(), effort.learning(plan)
        beyond = (passes - room * learning) / (learning + WRITING - 1)
        return int(room + beyond if beyond > 0 else passes / learning)
    if not measurable(shape):
        raise UsageError("distill: models with experts are not trained after pruning; leave distill out")
    return int(config.distill)


def disk_to_distill(
    model: PreTrainedModel,
    config: PruneConfig,
    plan: Plan,
    windows: Tensor,
    tokens: int,
    itemsize: int,
    device: torch.device,
) -> int:
    """What a training of a run from folder to folder keeps in files beside the layers, in bytes.

    That is the hidden states of what the dense model writes; on a CPU, where memory holds nothing that grows with the
    depth, also what is trained, in fp32 with Adam's moments in bfloat16, and the hidden states of all text in front of
    the layers and behind them.

    Args:
        model: the dense model; its tensors need no storage.
        tokens: see :func:`tokens_to_distill`.
        itemsize: bytes of a number as it is stored.
    """
    hidden = text_config(model.config).hidden_size * itemsize
    written = hidden * max(tokens - _room(windows), 0)
    if device.type != "cpu" or not tokens:
        return written
    structures = architecture_of(model.config, model).chosen(plan.head_unit)
    trained = 0.0
    for layer, dense, slim in zip(decoder_layers(model), layer_sizes(model.config), plan.layers):
        states = layer.state_dict()
        outputs = [(states[s.key].numel(), s.units(slim) / s.units(dense)) for s in structures if s.key in states]
        numbers = sum(tensor.numel() for tensor in states.values())
        trained += numbers * (1 - plan.achieved) if _effort(config).others else sum(n * left for n, left in outputs)
    return int(8 * trained) + 2 * written + 2 * hidden * tokens


def repaired_on(windows: Tensor, tokens: int) -> Tensor:
    """The windows that pruning calibrates on: if the pruned model is to be trained, the last ones are left out of it.

    What the repair has seen would speak for the model as the repair left it.

    Args:
        tokens: see :func:`tokens_to_distill`.
    """
    return windows[: -_held_windows(windows)] if tokens else windows


def rehearse(
    model: PreTrainedModel,
    take: Callable[[int], nn.Module],
    windows: Tensor,
    tokens: int,
    config: PruneConfig,
    run: Run,
    on_rehearsed: OnRehearsed | None = None,
    once: Callable[[Callable[[], Written]], Written] = lambda make: make(),
) -> Lesson:
    """Choose the text to train on, let the dense model write what is missing, and run it over all of it.

    Args:
        model: what is around the layers.
        take: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)`` long; the last ones are held out.
        tokens: see :func:`tokens_to_distill`.
        once: makes the text that the dense model writes, or gives what an earlier run has made.
    """
    run = _running(model, run)
    length = min(windows.shape[1], LENGTH)
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    given = repaired_on(windows, tokens)
    rest = pieces[: len(given) * (windows.shape[1] // length)]
    held = pieces[len(rest) :]
    effort = _effort(config)
    wanted = max(STEP_TOKENS, tokens // effort.steps) // length
    batch, per_step = _equal_batches(wanted, min(config.batch_size, len(held)))
    held = held[: len(held) // batch * batch]
    # Pieces of one document are spread over the steps.
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(config.seed))
    count = max(tokens // length, 1)
    written = max(count - len(rest), 0) // batch * batch
    layers = decoder_layers(model)
    text = Written(rest[:0], Tensor())
    if written:
        on_token = partial(on_rehearsed, "the dense model writes text") if on_rehearsed else None
        text = once(lambda: write(model, take, given, written, length, config.seed, run, on_token))
    chosen = torch.cat([held, text.ids, rest[order[:count]]])
    each = next(model.get_input_embeddings().parameters()).element_size()
    size = chosen.numel() * each * text_config(model.config).hidden_size
    stream = capture(model, layers, chosen, batch, shelf_for(run, size), run.dtype)
    dense, tuples = shelf_for(run, size), False
    known = range(len(held) // batch, (len(held) + written) // batch)
    for number, hidden in zip(known, text.hidden.split(batch)):
        dense.put(number, hidden)
    unknown = [number for number in range(len(stream)) if number not in known]
    with torch.no_grad():
        for index in range(len(layers)):
            start = time.perf_counter()
            layer = running_layer(take(index), model.config, index, run)
            before = dense if index else stream.hidden
            if index == 0:
                tuples = returns_tuple(layer, before.get(0), stream.arguments[0][index])
            for number in unknown:
                dense.put(number, run_layer(layer, before.get(number), stream.arguments[number][index]))
            del layer
            trim()
            if on_rehearsed:
                on_rehearsed("the dense model reads it", index, len(layers), time.perf_counter() - start)
    return Lesson(
        ids=chosen.split(batch),
        held=len(held) // batch,
        written=written // batch,
        per_step=per_step,
        others=effort.others,
        stream=stream,
        dense=dense,
        tuples=tuples,
    )


@dataclass
class _Passed:
    """One batch that has gone through a layer: what went in, the weights to be moved, and what came out."""

    hidden: Tensor
    weights: list[Tensor]
    after: Tensor


class _Found(NamedTuple):
    """The losses per compared token."""

    divergence: float
    surprise: float

    def loss(self, text: float) -> float:
        """What is minimised."""
        return self.divergence + text * self.surprise


class Distillation:
    """The training of a pruned model.

    Args:
        model: what is around the layers; it stays as it is.
        take: gives the pruned layer of an index; it stays as it is.
        plan: its widths.
        lesson: what :func:`rehearse` gave.
        run: as the model was pruned.
        reached: what an earlier run had reached, as it was told of it: the losses before, the divergence of every step,
            and the parameters with Adam's moments by number.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        take: Callable[[int], nn.Module],
        plan: Plan,
        lesson: Lesson,
        run: Run,
        reached: State | None = None,
    ):
        self.model, self.take, self.plan, self.lesson, self.reached = model, take, plan, lesson, reached
        self.run = _running(model, run)
        self.names: list[dict[str, int]] = []  # of every layer's trained parameters, with their numbers on the shelves
        self.types: list[torch.dtype] = []
        self.scales: list[float] = []
        self.trained = 0
        self.stay: dict[int, nn.Module] = {}  # layers that the device has room for
        self.trail: list[list[_Passed]] = []  # of every layer on the way forth; empty where it is to be run again

    def __call__(self, on_distilled: OnDistilled | None = None, on_reached: OnReached | None = None) -> dict[str, Any]:
        """Train, and say what it gave, per token; ``kept`` is whether the losses on the held-out text fell.

        Raises:
            NumericalError: NaN or infinity behind a layer.
        """
        start = kept = time.perf_counter()
        self._begin()
        steps, held = self.lesson.steps, range(self.lesson.held)
        with brought(self.model, self.run.device, self.run.dtype):
            before, curve = self._go_on() if self.reached else (self._look(held), [])
            far = math.sqrt(min(max(before.divergence, 0.0), 1.0))
            highest, text = RATE * far, TEXT * far
            for number, batches in list(enumerate(steps))[self.trained :]:
                began = time.perf_counter()
                heeded = text if batches[0] >= self.lesson.held + self.lesson.written else 0.0
                hidden = self._forth(batches, learn=True)
                found, gradients = self._compare(batches, hidden, heeded)
                self._back(batches, gradients, highest * _rate(number, len(steps)))
                self.trained += 1
                curve.append(found.divergence)
                trim()
                if on_distilled:
                    on_distilled(number, len(steps), found.divergence, time.perf_counter() - began)
                if on_reached and time.perf_counter() - kept > KEPT_EVERY and number + 1 < len(steps):
                    on_reached(self._state(before, curve))
                    kept = time.perf_counter()
            after = self._look(held)
        return {
            "tokens": self.lesson.count(number for step in steps for number in step),
            "written_tokens": self.lesson.count(range(self.lesson.held, self.lesson.held + self.lesson.written)),
            "steps": len(steps),
            "rate": highest,
            "held_out_tokens": self.lesson.count(held),
            "text_weight": text,
            "divergence": {"before": before.divergence, "after": after.divergence},
            "cross_entropy": {"before": before.surprise, "after": after.surprise},
            "curve": curve,
            "kept": after.loss(text) < before.loss(text),
            "seconds": time.perf_counter() - start,
        }

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
        """Bring what is trained to the shelves, in fp32: single steps are smaller than what 16 bits can tell apart."""
        found = [self._trained(self.take(index)) for index in range(len(self.plan.layers))]
        count = sum(parameter.numel() for named in found for parameter, _ in named.values())
        self.weights, self.means, self.squares = (shelf_for(self.run, size * count) for size in (4, 2, 2))
        for named in found:
            self.names.append({})
            for name, (parameter, share) in named.items():
                number = len(self.types)
                self.names[-1][name] = number
                self.types.append(parameter.dtype)
                weight = parameter.detach().to(self.run.device, torch.float32, copy=True)
                self.weights.put(number, weight)
                self.scales.append(share * float(weight.square().mean().sqrt()))
            trim()
        used = used_bytes(self.run.device)
        self.room = used + max(self.run.placement.budget - used, 0) // 3

    def _shelves(self) -> dict[str, Shelf]:
        return {"parameter": self.weights, "mean": self.means, "square": self.squares}

    def _state(self, before: _Found, curve: list[float]) -> State:
        """What has been reached."""
        kept = {f"{kind}.{n}": one for kind, shelf in self._shelves().items() for n, one in shelf.stored().items()}
        figures = {"before": before, "curve": curve}
        return {**kept, **{name: torch.tensor(values, dtype=torch.float64) for name, values in figures.items()}}

    def _go_on(self) -> tuple[_Found, list[float]]:
        """Take up what an earlier run had reached."""
        reached = self.reached or {}
        for kind, shelf in self._shelves().items():
            for number in range(len(self.types)):
                shelf.put(number, reached[f"{kind}.{number}"].to(self.run.device, copy=True))
        curve = reached["curve"].tolist()
        self.trained, self.reached = len(curve), None
        return _Found(*reached["before"].tolist()), curve

    def _trained(self, layer: nn.Module) -> dict[str, tuple[nn.Parameter, float]]:
        """The parameters of a layer that are trained, by name, and the share of the rate that is theirs: output
        matrices, what scales or shifts a norm, and perhaps all other matrices."""
        chosen = architecture_of(self.model.config, self.model).chosen(self.plan.head_unit)
        keys = {structure.key for structure in chosen}
        norms = [name for name, module in layer.named_modules() if "norm" in type(module).__name__.lower()]
        found = {}
        for name, parameter in layer.named_parameters():
            first = name in keys or name.rpartition(".")[0] in norms
            # A key's bias has no gradient but rounding, and Adam makes a full step of that.
            share = 1.0 if first else self.lesson.others if parameter.ndim > 1 else 0.0
            if share:
                found[name] = (parameter, share)
        return found

    def _layer(self, index: int) -> nn.Module:
        """A layer with the weights it has by now, of which gradients can be taken."""
        layer = self.stay.get(index)
        if layer is None:
            layer = running_layer(self.take(index), self.model.config, index, self.run, self.plan.layers[index])
            if used_bytes(self.run.device) < self.room:
                self.stay[index] = layer
        for name, parameter in layer.named_parameters():
            number = self.names[index].get(name)
            weight = parameter.detach() if number is None else self.weights.get(number).to(parameter.dtype)
            put_parameter(layer, name, nn.Parameter(weight, requires_grad=number is not None))
        return layer

    def _look(self, batches: Sequence[int]) -> _Found:
        return self._compare(batches, self._forth(batches))[0]

    def _forth(self, batches: Sequence[int], learn: bool = False) -> list[Tensor]:
        """The hidden states of some batches behind the last layer.

        Args:
            learn: whether the way back will be gone. Every layer's inputs are kept for it, and with them, as long as
                there is room, all that gradients are made of, so that the layer need not be run again.
        """
        arguments, device = self.lesson.stream.arguments, self.run.device
        hidden = [self.lesson.stream.hidden.get(number) for number in batches]
        self.inputs = shelf_for(self.run, len(self.plan.layers) * sum(tensor.nbytes for tensor in hidden))
        self.trail = []
        used = used_bytes(device)
        ceiling = used + (self.run.placement.budget - used) // 2 if self.inputs.place == DEVICE else 0
        for index in range(len(self.plan.layers)):
            layer, passed = self._layer(index), list[_Passed]()
            keep = learn and used_bytes(device) < ceiling
            for place, number in enumerate(batches):
                if keep:
                    passed.append(self._pass(layer, index, hidden[place], arguments[number][index]))
                    hidden[place] = passed[-1].after.detach()
                    continue
                if learn:
                    self.inputs.put(index * len(batches) + place, hidden[place])
                with torch.no_grad():
                    hidden[place] = run_layer(layer, hidden[place], arguments[number][index])
            check_output(index, hidden[-1])
            self.trail.append(passed)
            del layer
        return hidden

    def _compare(
        self, batches: Sequence[int], hidden: list[Tensor], text: float | None = None
    ) -> tuple[_Found, list[Tensor]]:
        """The losses of some batches, and their gradients behind the last layer.

        Args:
            text: its weight in the gradients; ``None``: these are not wanted, and zero.
        """
        slopes = text is not None
        divergence, surprise, gradients, tokens = 0.0, 0.0, [], 0
        for place, number in enumerate(batches):
            ids, dense = self.lesson.ids[number], self.lesson.dense.get(number)
            apart, said, steep = divergences(
                self.model, dense, [hidden[place]], ids, self.lesson.tuples, [slopes], text or 0.0
            )
            divergence, surprise = divergence + apart[0], surprise + said[0]
            gradients += steep
            tokens += ids[:, 1:].numel()
        return _Found(divergence / max(tokens, 1), surprise / max(tokens, 1)), gradients

    def _pass(self, layer: nn.Module, index: int, hidden: Tensor, arguments: Arguments) -> _Passed:
        """Run a layer so that gradients can be taken."""
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            after = run_layer(layer, leaf, arguments)
        return _Passed(leaf, [layer.get_parameter(name) for name in self.names[index]], after)

    def _back(self, batches: Sequence[int], gradients: list[Tensor], rate: float) -> None:
        """Gradients of every layer from the last to the first; each is moved once its own are known."""
        for index in reversed(range(len(self.plan.layers))):
            totals: list[Tensor] = []
            for place, one in enumerate(self.trail.pop() or self._again(index, batches)):
                found = torch.autograd.grad(
                    one.after, [one.hidden, *one.weights], gradients[place], materialize_grads=True
                )
                gradients[place] = found[0]
                sums = totals or [0.0] * len(one.weights)
                totals = [total + gradient.float() for total, gradient in zip(sums, found[1:])]
            for number, gradient in zip(self.names[index].values(), totals):
                self._move(number, gradient, rate)

    def _again(self, index: int, batches: Sequence[int]) -> Iterator[_Passed]:
        """Run a layer a second time, one batch after the other, on the inputs that were kept."""
        layer = self._layer(index)
        for place, number in enumerate(batches):
            hidden = self.inputs.get(index * len(batches) + place)
            yield self._pass(layer, index, hidden, self.lesson.stream.arguments[number][index])

    def _move(self, number: int, gradient: Tensor, rate: float) -> None:
        """One step of Adam."""
        weight, fresh = self.weights.get(number), self.trained == 0
        mean = torch.zeros_like(weight) if fresh else self.means.get(number).float()
        square = torch.zeros_like(weight) if fresh else self.squares.get(number).float()
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        count = self.trained + 1
        spread = (square / (1 - BETAS[1] ** count)).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
        weight.addcdiv_(mean, spread, value=-rate * self.scales[number] / (1 - BETAS[0] ** count))
        self.weights.put(number, weight)
        self.means.put(number, mean.bfloat16())
        self.squares.put(number, square.bfloat16())


def _rate(step: int, steps: int) -> float:
    """The rate of a step, as a share of the highest: it rises, then falls to nothing on a cosine."""
    rise = max(int(WARMUP * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def _equal_batches(count: int, most: int) -> tuple[int, int]:
    """The size and the number of the fewest equal batches, none above ``most``, that a step of about ``count`` pieces
    is made of."""
    number = -(-count // most)
    return count // number, number


def _running(model: PreTrainedModel, run: Run) -> Run:
    """The run as the training needs it: gradients do not fit into float16, so bfloat16 takes its place."""
    stored = next(model.get_input_embeddings().parameters()).dtype
    return run.alone(torch.bfloat16 if (run.dtype or stored) == torch.float16 else run.dtype)


def _effort(config: PruneConfig) -> _Effort:
    return SEARCH if config.allocation == "search" else USUAL


def _room(windows: Tensor) -> int:
    """How many calibration tokens can be trained on."""
    return (len(windows) - _held_windows(windows)) * windows.shape[1]


def _held_windows(windows: Tensor) -> int:
    return max(min(HELD_TOKENS, windows.numel() // 4) // windows.shape[1], 1)
