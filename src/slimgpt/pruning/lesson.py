"""What a pruned model is trained on: how much text its budget pays for, and what the dense model makes of that text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.errors import UsageError
from slimgpt.models.heterogeneous import architecture_of, decoder_layers, layer_sizes, text_config
from slimgpt.models.shape import ModelShape
from slimgpt.planning.plan import Plan
from slimgpt.pruning.capture import Stream, capture, run_layer
from slimgpt.pruning.memory import Shelf, trim
from slimgpt.pruning.predictions import returns_tuple
from slimgpt.pruning.sensitivity import measurable
from slimgpt.pruning.sequential import Run, running_layer, shelf_for
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

OnRehearsed = Callable[[str, int, int, float], None]
"""Called after every step of what comes before the training, with what is done, the step's number, the number of all
such steps, and the seconds."""


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
        if not measurable(shape) or windows.numel() < LEAST_TOKENS or len(windows) == 1:
            return 0
        effort, room = _effort(config), _room(windows)
        passes, learning = effort.passes * windows.numel(), effort.learning(plan)
        beyond = (passes - room * learning) / (learning + WRITING - 1)
        return int(room + beyond if beyond > 0 else passes / learning)
    if not measurable(shape):
        raise UsageError("distill: models with experts are not trained after pruning; leave distill out")
    if len(windows) == 1:
        raise UsageError(
            "distill: the last of the calibration windows is only judged by, so one is too few; raise --num-samples, "
            "with a lower --seq-len if the text is short"
        )
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
    run = training_run(model, run)
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


def _equal_batches(count: int, most: int) -> tuple[int, int]:
    """The size and the number of the fewest equal batches, none above ``most``, that a step of about ``count`` pieces
    is made of."""
    number = -(-count // most)
    return count // number, number


def training_run(model: PreTrainedModel, run: Run) -> Run:
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
