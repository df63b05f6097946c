"""Data of the training after pruning: calibration and generated text, and the dense model's hidden states on it.

Several processes divide the windows of every step, and those held out, so that a step's text is the same whatever their
number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.distillation.generate import GeneratedText, generate_text
from slimgpt.distillation.schedule import MAX_SEQ_LEN, pruning_split, trainable_tokens, training_budget
from slimgpt.layerwise.capture import LayerInputs, capture
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, running_layer
from slimgpt.layerwise.passes import LayerPasses, LayerVariant
from slimgpt.layerwise.shared_states import arguments_width, stream_width
from slimgpt.models.build import decoder_layers
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.memory import malloc_trim
from slimgpt.runtime.thresholds import thresholds

OnRehearsed = Callable[[str, int, int, float], None]
"""Called after every step of what comes before the training, with what is done, the step's number, the number of all
such steps, and the seconds."""


@dataclass
class DistillationData:
    """This process's text in batches, and the dense model's hidden states on it.

    Args:
        ids: the tokens of every batch, ``(batch, seq_len)``.
        held_out: number of held-out batches; they come first.
        generated: number of batches of generated text; they follow.
        steps: the numbers of the batches of every step, none where other processes have all windows of it; no step
            mixes generated and calibration text.
        generated_steps: number of steps on generated text; they come first.
        tokens: of all processes, ``held_out``, ``generated`` and ``trained`` on (generated ones included).
        other_matrices_lr: see :class:`TrainingBudget`.
        inputs: the inputs of the first layer, and every layer's arguments.
        dense_hidden: the hidden states behind the dense model's last layer, by batch.
        tuple_length: of the tuple whose first item are the hidden states that a dense layer returns; 0: they are alone.
    """

    ids: Sequence[Tensor]
    held_out: int
    generated: int
    steps: Sequence[range]
    generated_steps: int
    tokens: dict[str, int]
    other_matrices_lr: float
    inputs: LayerInputs
    dense_hidden: ActivationStore
    tuple_length: int

    def count(self, numbers: Iterable[int]) -> int:
        """Number of tokens in the given batches."""
        return sum(self.ids[number].numel() for number in numbers)


def build_distillation_data(
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    tokens: int,
    config: PruneConfig,
    run: ExecutionContext,
    *,
    on_rehearsed: OnRehearsed | None = None,
    load_or_generate: Callable[[Callable[[], GeneratedText]], GeneratedText] = lambda make: make(),
) -> DistillationData:
    """Choose calibration text, generate the missing tokens, and run the dense model over all of it.

    Args:
        model: gives embeddings, final norm and LM head.
        load_layer: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)`` long; the last ones are held out.
        tokens: see :func:`tokens_to_distill`.
        run: its processes divide the text.
        load_or_generate: calls the function it is given, or returns the text of the run being resumed.
    """
    run = training_run(model, run)
    length = min(windows.shape[1], MAX_SEQ_LEN)
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    calibration = pruning_split(windows, tokens)
    rest = pieces[: trainable_tokens(windows) // length]
    held_out = pieces[len(rest) :]
    budget = training_budget(config)
    pieces_per_step = max(thresholds().step_tokens, tokens // budget.steps) // length
    batch, per_step = _equal_batches(pieces_per_step, min(config.batch_size, len(held_out)))
    # A CPU runs windows one by one as fast as together, and then what is rounded where does not depend on the number of
    # processes that divide a step; Adam makes whole steps of small differences.
    together = 1 if run.device.type == "cpu" else batch
    held_out = held_out[: len(held_out) // batch * batch]
    # Pieces of one document are spread over the steps.
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(config.seed))
    count = max(tokens // length, 1)
    generated = max(count - len(rest), 0) // batch * batch
    layers = decoder_layers(model)
    text = GeneratedText(rest[:0], Tensor())
    if generated:
        on_token = partial(on_rehearsed, "generating") if on_rehearsed and run.ranks.main else None
        text = load_or_generate(
            lambda: generate_text(
                model, load_layer, calibration, generated, length, config.seed, run, on_token=on_token
            )
        )
    chosen = torch.cat([held_out, text.ids, rest[order[:count]]])
    first, last = len(held_out), len(held_out) + generated  # rows of the generated text
    rows = [_batches(range(first), together, run.ranks)]
    for start, stop in ((first, last), (last, len(chosen))):
        for begin in range(start, stop, batch * per_step):
            rows.append(_batches(range(begin, min(begin + batch * per_step, stop)), together, run.ranks))
    held, *steps = _numbered(rows)
    batches = [own for part in rows for own in part]
    own_windows = chosen[[row for own in batches for row in own]]
    sizes = list(map(len, batches))
    itemsize = next(model.get_input_embeddings().parameters()).element_size()
    size = own_windows.numel() * itemsize * stream_width(model.config)
    captured = activation_store_for(run, size + own_windows.numel() * itemsize * arguments_width(model.config))
    inputs = capture(model, layers, own_windows, sizes, captured, run.dtype)
    dense_hidden = activation_store_for(run, size)
    with_hidden = [number for number, own in enumerate(batches) if first <= own.start < last]
    for number in with_hidden:
        dense_hidden.put(number, text.hidden[batches[number].start - first : batches[number].stop - first])
    to_run = [number for number in range(len(inputs)) if number not in with_hidden]
    for number in to_run:
        dense_hidden.put(number, inputs.hidden.get(number))

    def dense_layer(index: int, _paths: Sequence[int]) -> Iterator[LayerVariant]:
        yield LayerVariant(running_layer(load_layer(index), model.config, index, run), [])

    passes = LayerPasses(dense_layer, inputs.arguments, to_run, run, num_layers=len(layers))
    start = time.perf_counter()
    for index in passes.forward([dense_hidden]):
        malloc_trim()
        if on_rehearsed and run.ranks.main:
            on_rehearsed("teacher", index, len(layers), time.perf_counter() - start)
        start = time.perf_counter()
    return DistillationData(
        ids=own_windows.split(sizes),
        held_out=len(held),
        generated=len(with_hidden),
        steps=steps,
        generated_steps=-(-generated // (batch * per_step)),
        tokens={
            "held_out": held_out.numel(),
            "generated": generated * length,
            "trained": (len(chosen) - first) * length,
        },
        other_matrices_lr=budget.other_matrices_lr,
        inputs=inputs,
        dense_hidden=dense_hidden,
        tuple_length=run.ranks.agree(passes.tuple_length),  # the first process has a share of every part
    )


def _batches(rows: range, size: int, ranks: Ranks) -> list[range]:
    """This process's share of some rows in batches, none above ``size``."""
    own = rows[ranks.rows(len(rows))]
    return [own[start : start + size] for start in range(0, len(own), size)]


def _numbered(parts: Sequence[Sequence[range]]) -> list[range]:
    """The numbers of the batches of every part, counted through all of them."""
    ends = list(accumulate(map(len, parts)))
    return [range(end - len(part), end) for part, end in zip(parts, ends, strict=True)]


def _equal_batches(count: int, most: int) -> tuple[int, int]:
    """The size and the number of the fewest equal batches, none above ``most``, that a step of about ``count`` pieces
    is made of."""
    number = -(-count // most)
    return count // number, number


def training_run(model: PreTrainedModel, run: ExecutionContext) -> ExecutionContext:
    """The context of the training: gradients overflow float16, so bfloat16 replaces it."""
    stored = next(model.get_input_embeddings().parameters()).dtype
    return replace(run, dtype=torch.bfloat16 if (run.dtype or stored) == torch.float16 else run.dtype)
