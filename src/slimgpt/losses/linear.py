"""A loss of logits that are never whole: the output head is applied to some tokens at a time.

Logits, their copies and their gradient have a vocabulary's size for every token, several times what a small model's
activations take. Here the gradient with respect to the head's input is computed with the loss, piece by piece, as
Liger's fused linear losses do it on a GPU (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOGITS = 2**23
"""Logits that are there at once."""

PieceLoss = Callable[[Tensor, slice], Tensor]
"""From the logits of some tokens, ``(count, vocabulary)``, and their place among all to their summed loss."""


def linear_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: PieceLoss, most: int = MAX_LOGITS) -> Tensor:
    """The sum over tokens of a loss of ``hidden @ weight.T + bias``; differentiable with respect to all three.

    Args:
        hidden: ``(tokens, hidden_size)``.
        weight: of the output head, ``(vocabulary, hidden_size)``.
        bias: ``(vocabulary,)``.
        most: logits that are computed at once.
    """
    rows = max(most // len(weight), 1)
    return _LinearLoss.apply(hidden, weight, bias, loss, rows, torch.is_grad_enabled())


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: PieceLoss,
        rows: int,
        differentiate: bool,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        tensors = (hidden, weight, bias)
        needed = [differentiate and tensor is not None and tensor.requires_grad for tensor in tensors]
        # Those of the head are sums over pieces, which 16 bits would round every time.
        gradients = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32) if number else tensor.dtype)
            if need and tensor is not None
            else None
            for number, (need, tensor) in enumerate(zip(needed, tensors))
        ]
        for start in range(0, len(hidden), rows):
            place = slice(start, min(start + rows, len(hidden)))
            parts = [hidden[place], weight, bias]
            leaves = [None if part is None else part.detach() for part in parts]
            wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed) if need and leaf is not None]
            with torch.set_grad_enabled(bool(wanted)):
                piece = loss(F.linear(leaves[0], leaves[1], leaves[2]), place)  # type: ignore[arg-type]
            total += piece.detach()
            own = iter(torch.autograd.grad(piece, wanted) if wanted else ())
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    (gradient[place] if number == 0 else gradient).add_(next(own))
        ctx.save_for_backward(
            *(
                None if gradient is None or tensor is None else gradient.to(tensor.dtype)
                for gradient, tensor in zip(gradients, tensors)
            )
        )
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        (output_gradient,) = output_gradients
        gradients = (None if each is None else each * output_gradient.to(each.dtype) for each in ctx.saved_tensors)
        return (*gradients, None, None, None)
