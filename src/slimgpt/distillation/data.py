"""What a pruned model is trained on: how much text its budget pays for, and what the dense model makes of that text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.distillation.generate import Written, write
from slimgpt.distillation.schedule import LENGTH, STEP_TOKENS, _effort, repaired_on
from slimgpt.layerwise.capture import Stream, capture, run_layer
from slimgpt.layerwise.context import Run, running_layer, shelf_for
from slimgpt.layerwise.divergence import returns_tuple
from slimgpt.models.build import decoder_layers
from slimgpt.models.lookup import text_config
from slimgpt.runtime.activation_store import Shelf
from slimgpt.runtime.memory import trim

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
        tuples: see :func:`slimgpt.layerwise.divergence.returns_tuple`.
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
    return run.single_process(torch.bfloat16 if (run.dtype or stored) == torch.float16 else run.dtype)
