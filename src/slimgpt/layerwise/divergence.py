"""How far a narrowed model's predictions are from the dense model's, given what is behind the last layer of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.layerwise.capture import patched_layers
from slimgpt.losses.chunked import compare
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.lookup import text_config

LOGITS = 2**24
"""Predictions are compared in pieces of at most so many logits."""


def kl_and_cross_entropy(
    model: PreTrainedModel,
    dense: Tensor,
    narrowed: Sequence[Tensor],
    ids: Tensor,
    tuples: bool,
    slopes: Sequence[bool],
    text: float = 0.0,
) -> tuple[list[float], list[float], list[Tensor]]:
    """``KL(dense || narrowed)`` and the cross-entropy with the tokens that follow, summed over tokens, and the
    gradient of both, for each of several narrowed models.

    The model's own code computes the predictions, its layers being stood in for. The first position is left out:
    nothing is known there, yet what holds attention sinks up shows in it.

    Args:
        model: what is around the layers: norm, head, and what lies between; it stays as it is.
        dense: the dense model's hidden states behind the last layer, ``(batch, seq_len, hidden_size)``.
        narrowed: those of the others; gradients are with respect to these.
        ids: the tokens, ``(batch, seq_len)``.
        tuples: whether layers return the hidden states as the first item of a tuple; their stand-ins then do, too.
        slopes: of which of them gradients are wanted; of others they are zero.
        text: the weight of the cross-entropy beside the divergence in the gradients.
    """
    embedding = next(model.get_input_embeddings().parameters())
    most = max(LOGITS // text_config(model.config).vocab_size, 1)
    hidden = dense

    def predictions(stream: Tensor, tokens: Tensor) -> Tensor:
        nonlocal hidden
        hidden = stream.to(embedding)
        return model(input_ids=tokens.to(embedding.device), use_cache=False).logits[0]

    follows = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    totals, surprises = [0.0] * len(narrowed), [0.0] * len(narrowed)
    gradients = [torch.zeros_like(other) for other in narrowed]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        with patched_layers(decoder_layers(model), lambda _: lambda *_, **__: (hidden,) if tuples else hidden):
            for row in range(len(ids)):
                for start in range(1, ids.shape[1], most):
                    place = (slice(row, row + 1), slice(start, start + most))
                    with torch.no_grad():
                        teacher = predictions(dense[place], ids[place])
                    for number, (other, wanted) in enumerate(zip(narrowed, slopes, strict=True)):
                        leaf = other[place].detach().requires_grad_(wanted)
                        with torch.set_grad_enabled(wanted):
                            student = predictions(leaf, ids[place])
                        found = compare(teacher, student.detach(), follows[place][0], text, wanted)
                        if found.gradient is not None:
                            gradients[number][place] = torch.autograd.grad(student, leaf, found.gradient)[0]
                        totals[number] += found.divergence
                        surprises[number] += found.surprise
    finally:
        for parameter, learns in frozen:
            parameter.requires_grad_(learns)
    return totals, surprises, gradients


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """What is around the layers on a device for a while: a head multiplies more than any layer does.

    Args:
        dtype: of its parameters meanwhile; ``None`` leaves them as they are.
    """
    inside = f"{architecture_of(model.config, model).layers}."
    named = chain(model.named_parameters(), model.named_buffers())
    homes = [(tensor, tensor.data) for name, tensor in named if not name.startswith(inside) and not tensor.is_meta]
    try:
        for tensor, data in homes:
            tensor.data = data.to(device, dtype if isinstance(tensor, nn.Parameter) else None)
        yield
    finally:
        for tensor, data in homes:
            tensor.data = data
