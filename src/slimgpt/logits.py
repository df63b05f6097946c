"""Log-probabilities and divergences from logits, without making anything else of their size.

Large vocabularies make these the dearest part of a training step on a CPU, nearly all of it time in which memory is
read and written. So logits are worked on in pieces that stay in a processor's caches, and gradients are written in the
logits' own type, once. Everything is computed in fp32, or in fp64 where the logits are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CACHED, LARGE = 2**20, 2**26
"""Logits that are worked on at once: as many as a processor's caches hold, and as many on other devices."""


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """``log softmax(logits)`` of some tokens, ``(tokens, k)``; gradients can be taken.

    Args:
        logits: ``(tokens, vocabulary)``.
        ids: ``(tokens, k)``.
    """
    return _LogProbabilities.apply(logits, ids)


@torch.no_grad()
def kullback_leibler(teacher: Tensor, student: Tensor, slopes: bool = True) -> tuple[float, Tensor | None]:
    """``KL(teacher || student)`` summed over tokens, and its gradient with respect to the student's logits.

    Args:
        teacher: logits ``(tokens, vocabulary)``.
        student: the same.
        slopes: whether the gradient is wanted.
    """
    gradient = torch.empty_like(student) if slopes else None
    total = 0.0
    for piece in _pieces(student):
        log_p, log_q = (_wide(logits[piece]).log_softmax(-1) for logits in (teacher, student))
        p = log_p.exp()
        total += float((p * log_p.sub_(log_q)).sum())
        if gradient is not None:
            gradient[piece] = log_q.exp_().sub_(p)
    return total, gradient


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        totals = [_wide(logits[piece]).logsumexp(-1) for piece in _pieces(logits)]
        total = torch.cat(totals) if totals else _wide(logits[:, 0])
        ctx.save_for_backward(logits, ids, total)
        return _wide(logits.gather(-1, ids)) - total[:, None]

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        logits, ids, total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for piece in _pieces(logits):
            softmax = (_wide(logits[piece]) - total[piece, None]).exp_()
            softmax *= -slope[piece].sum(-1, keepdim=True)
            gradient[piece] = softmax.scatter_add_(-1, ids[piece], slope[piece])
        return gradient, None


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows = max((CACHED if logits.device.type == "cpu" else LARGE) // logits.shape[-1], 1)
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
