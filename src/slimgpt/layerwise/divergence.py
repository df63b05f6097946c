"""KL divergence of narrowed models from the dense one, from the hidden states behind the last layer of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from slimgpt.layerwise.capture import patched_layers
from slimgpt.losses.chunked import TokenDivergence, distillation_loss, sum_dtype, token_divergence
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.lookup import text_config

MAX_COMPARED_LOGITS = 2**24
"""Most logits of one comparison of predictions."""


def kl_and_cross_entropy(
    model: PreTrainedModel,
    dense: Tensor,
    narrowed: Sequence[Tensor],
    ids: Tensor,
    tuple_length: int,
    with_gradient: Sequence[bool],
    text_weight: float = 0.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """``KL(dense || narrowed)``, the cross-entropy with the next tokens, summed over tokens, and the gradient of both.

    Of every narrowed model, ``(models,)`` each; they stay on the device, which nothing waits for.

    The model's own code computes the predictions, with its layers replaced. Position 0 is excluded: it has no context,
    and attention-sink activations dominate it.

    Args:
        model: gives embeddings, final norm and LM head; unchanged.
        dense: the dense model's hidden states behind the last layer, ``(batch, seq_len, hidden_size)``.
        narrowed: the narrowed models' hidden states; gradients are with respect to these.
        ids: the tokens, ``(batch, seq_len)``.
        tuple_length: layers return the hidden states as the first item of a tuple of this length, and so do their
            replacements; 0: by themselves.
        with_gradient: for each narrowed model, whether its gradient is computed; else it is zero.
        text_weight: weight of the cross-entropy relative to the divergence in the gradients.
    """
    chunk = _chunk(model)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    kls, cross_entropies = torch.zeros(2, len(narrowed), dtype=sum_dtype(dense.device), device=dense.device)
    gradients = [torch.zeros_like(other) for other in narrowed]
    with _predictions(model, tuple_length) as predictions:
        for row in range(len(ids)):
            for start in range(1, ids.shape[1], chunk):
                place = (slice(row, row + 1), slice(start, start + chunk))
                with torch.no_grad():
                    teacher = predictions(dense[place], ids[place])
                for number, (states, differentiate) in enumerate(zip(narrowed, with_gradient, strict=True)):
                    leaf = states[place].detach().requires_grad_(differentiate)
                    with torch.set_grad_enabled(differentiate):
                        student = predictions(leaf, ids[place])
                    loss = distillation_loss(teacher, student.detach(), labels[place][0], text_weight, differentiate)
                    if loss.gradient is not None:
                        gradients[number][place] = torch.autograd.grad(student, leaf, loss.gradient)[0]
                    kls[number] += loss.kl
                    cross_entropies[number] += loss.cross_entropy
    return kls, cross_entropies, gradients


@torch.no_grad()
def predicted_tokens(
    model: PreTrainedModel, dense: Tensor, narrowed: Tensor, ids: Tensor, tuple_length: int
) -> TokenDivergence:
    """Divergence token by token in fp32, of every token but a window's first: ``(batch * (seq_len - 1),)``, on the CPU.

    Args:
        model: gives embeddings, final norm and LM head; unchanged.
        dense: the dense model's hidden states behind the last layer, ``(batch, seq_len, hidden_size)``.
        narrowed: the narrowed model's.
        ids: the tokens, ``(batch, seq_len)``.
        tuple_length: see :func:`kl_and_cross_entropy`.
    """
    chunk, last, pieces = _chunk(model), ids.shape[1] - 1, []
    with _predictions(model, tuple_length) as predictions:
        for row in range(len(ids)):
            for start in range(0, last, chunk):
                end = min(start + chunk, last)
                place = (slice(row, row + 1), slice(start, end))
                teacher, student = (predictions(states[place], ids[place]) for states in (dense, narrowed))
                labels = ids[row, start + 1 : end + 1].to(student.device)
                pieces.append([part.cpu() for part in token_divergence(teacher, student, labels, torch.float32)])
    return TokenDivergence(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _chunk(model: PreTrainedModel) -> int:
    """Tokens whose predictions are compared at once."""
    return max(MAX_COMPARED_LOGITS // text_config(model.config).vocab_size, 1)


@contextmanager
def _predictions(model: PreTrainedModel, tuple_length: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Context manager: a function from hidden states ``(1, n, hidden_size)`` behind the last layer, and tokens, to
    logits ``(n, vocabulary)``; no parameter has a gradient meanwhile."""
    embedding = next(model.get_input_embeddings().parameters())
    hidden = embedding

    def predictions(states: Tensor, tokens: Tensor) -> Tensor:
        nonlocal hidden
        hidden = states.to(embedding)
        return model(input_ids=tokens.to(embedding.device), use_cache=False).logits[0]

    frozen = [(p, p.requires_grad) for p in model.parameters()]
    look = masking_utils.find_packed_sequence_indices
    try:
        # It would wait for the device to look for several sequences in a window, which there never are.
        masking_utils.find_packed_sequence_indices = lambda _: None
        model.requires_grad_(False)
        rest = (None,) * (tuple_length - 1)  # what some layers hand to the next one, such as chosen tokens
        with patched_layers(
            decoder_layers(model), lambda _: lambda *_, **__: (hidden, *rest) if tuple_length else hidden
        ):
            yield predictions
    finally:
        masking_utils.find_packed_sequence_indices = look
        for parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Context manager: moves embeddings, final norm and LM head to ``device``; the head is the most expensive matmul.

    Args:
        dtype: of the moved parameters; ``None`` leaves it as it is.
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
