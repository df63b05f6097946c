"""Log-probabilities and divergences from logits, without making anything else of their size.

Large vocabularies make these the dearest part of a training step on a CPU, nearly all of it time in which memory is
read and written. So logits are worked on in pieces that stay in a processor's caches, and gradients are written in the
logits' own type, once. Everything is computed in fp32, or in fp64 where the logits are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Losses(NamedTuple):
    """What :func:`compare` finds, summed over tokens.

    Args:
        divergence: ``KL(teacher || student)``.
        surprise: the student's cross-entropy with what the text says, or 0.
        gradient: of ``divergence + weight * surprise`` with respect to the student's logits, in their type.
    """

    divergence: float
    surprise: float
    gradient: Tensor | None


@torch.no_grad()
def compare(
    teacher: Tensor, student: Tensor, says: Tensor | None = None, weight: float = 0.0, slopes: bool = True
) -> Losses:
    """How far a student is from its teacher, and from the text.

    Args:
        teacher: logits ``(tokens, vocabulary)``.
        student: the same.
        says: the tokens that the text says, ``(tokens,)``; -100 where it says nothing; ``None``: nowhere anything.
        weight: see :class:`Losses`.
        slopes: whether the gradient is wanted.
    """
    gradient = torch.empty_like(student) if slopes else None
    told = torch.full((len(student),), -100) if says is None else says
    told = told.to(student.device)[:, None]
    divergence = surprise = 0.0
    for piece in _pieces(student):
        log_p, log_q = (_wide(logits[piece]).log_softmax(-1) for logits in (teacher, student))
        said, ids = (told[piece] >= 0).to(log_q), told[piece].clamp_min(0)
        surprise -= float((said * log_q.gather(-1, ids)).sum())
        p = log_p.exp()
        divergence += float((p * log_p.sub_(log_q)).sum())
        if gradient is not None:
            q = log_q.exp_()
            if weight:
                q *= 1 + weight * said
                q.scatter_add_(-1, ids, -weight * said)
            gradient[piece] = q.sub_(p)
    return Losses(divergence, surprise, gradient)


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
