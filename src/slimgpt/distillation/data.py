"""Data of the training after pruning: calibration and generated text, and the dense model's hidden states on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.distillation.generate import GeneratedText, generate_text
from slimgpt.distillation.schedule import MAX_SEQ_LEN, pruning_split, training_budget
from slimgpt.layerwise.capture import LayerInputs, capture
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, running_layer
from slimgpt.layerwise.passes import LayerPasses, LayerVariant
from slimgpt.models.build import decoder_layers
from slimgpt.models.lookup import text_config
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import malloc_trim
from slimgpt.runtime.thresholds import thresholds

OnRehearsed = Callable[[str, int, int, float], None]
"""Called after every step of what comes before the training, with what is done, the step's number, the number of all
such steps, and the seconds."""


@dataclass
class DistillationData:
    """Text in batches, and the dense model's hidden states on it.

    Args:
        ids: the tokens of every batch, ``(batch, seq_len)``.
        held_out: number of held-out batches; they come first.
        generated: number of batches of generated text; they follow.
        per_step: batches per training step.
        other_matrices_lr: see :class:`TrainingBudget`.
        inputs: the inputs of the first layer, and every layer's arguments.
        dense_hidden: the hidden states behind the dense model's last layer, by batch.
        tuple_length: of the tuple whose first item are the hidden states that a dense layer returns; 0: they are alone.
    """

    ids: Sequence[Tensor]
    held_out: int
    generated: int
    per_step: int
    other_matrices_lr: float
    inputs: LayerInputs
    dense_hidden: ActivationStore
    tuple_length: int

    @property
    def steps(self) -> list[range]:
        """The numbers of the batches of every step; no step mixes generated and calibration text."""
        steps, count = [], len(self.ids)
        for first, last in ((self.held_out, self.held_out + self.generated), (self.held_out + self.generated, count)):
            starts = range(first, last, self.per_step)
            steps += [range(start, min(start + self.per_step, last)) for start in starts]
        return steps

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
        load_or_generate: calls the function it is given, or returns the text of the run being resumed.
    """
    run = training_run(model, run)
    length = min(windows.shape[1], MAX_SEQ_LEN)
    pieces = windows[:, : windows.shape[1] // length * length].reshape(-1, length)
    calibration = pruning_split(windows, tokens)
    rest = pieces[: len(calibration) * (windows.shape[1] // length)]
    held_out = pieces[len(rest) :]
    budget = training_budget(config)
    pieces_per_step = max(thresholds().step_tokens, tokens // budget.steps) // length
    batch, per_step = _equal_batches(pieces_per_step, min(config.batch_size, len(held_out)))
    held_out = held_out[: len(held_out) // batch * batch]
    # Pieces of one document are spread over the steps.
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(config.seed))
    count = max(tokens // length, 1)
    generated = max(count - len(rest), 0) // batch * batch
    layers = decoder_layers(model)
    text = GeneratedText(rest[:0], Tensor())
    if generated:
        on_token = partial(on_rehearsed, "generating") if on_rehearsed else None
        text = load_or_generate(
            lambda: generate_text(
                model, load_layer, calibration, generated, length, config.seed, run, on_token=on_token
            )
        )
    chosen = torch.cat([held_out, text.ids, rest[order[:count]]])
    itemsize = next(model.get_input_embeddings().parameters()).element_size()
    size = chosen.numel() * itemsize * text_config(model.config).hidden_size
    inputs = capture(model, layers, chosen, batch, activation_store_for(run, size), run.dtype)
    dense_hidden = activation_store_for(run, size)
    with_hidden = range(len(held_out) // batch, (len(held_out) + generated) // batch)
    for number, hidden in zip(with_hidden, text.hidden.split(batch)):
        dense_hidden.put(number, hidden)
    to_run = [number for number in range(len(inputs)) if number not in with_hidden]
    for number in to_run:
        dense_hidden.put(number, inputs.hidden.get(number))

    def dense_layer(index: int, _paths: Sequence[int]) -> Iterator[LayerVariant]:
        yield LayerVariant(running_layer(load_layer(index), model.config, index, run), [])

    passes, start = LayerPasses(dense_layer, inputs.arguments, to_run, run), time.perf_counter()
    for index in passes.forward([dense_hidden]):
        malloc_trim()
        if on_rehearsed:
            on_rehearsed("teacher", index, len(layers), time.perf_counter() - start)
        start = time.perf_counter()
    return DistillationData(
        ids=chosen.split(batch),
        held_out=len(held_out) // batch,
        generated=generated // batch,
        per_step=per_step,
        other_matrices_lr=budget.other_matrices_lr,
        inputs=inputs,
        dense_hidden=dense_hidden,
        tuple_length=passes.tuple_length,
    )


def _equal_batches(count: int, most: int) -> tuple[int, int]:
    """The size and the number of the fewest equal batches, none above ``most``, that a step of about ``count`` pieces
    is made of."""
    number = -(-count // most)
    return count // number, number


def training_run(model: PreTrainedModel, run: ExecutionContext) -> ExecutionContext:
    """The context of the training: gradients overflow float16, so bfloat16 replaces it."""
    stored = next(model.get_input_embeddings().parameters()).dtype
    return run.single_process(torch.bfloat16 if (run.dtype or stored) == torch.float16 else run.dtype)
