"""Chunked log-probabilities, KL divergence and cross-entropy, without another tensor of the logits' size.

With large vocabularies these dominate a training step on a CPU and are bound by memory bandwidth. So logits are
processed in chunks that fit a processor's caches, and gradients are written once, in the logits' own type. What is
trained on is computed in fp32, or in fp64 for fp64 logits; what is reported of a token, in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU_CHUNK, GPU_CHUNK = 2**20, 2**26
"""Logits per chunk: what a processor's caches hold, and the size on other devices."""


def log_probabilities(logits: Tensor, ids: Tensor, chunk: int | None = None) -> Tensor:
    """``log softmax(logits)`` of given tokens, ``(tokens, k)``; differentiable.

    Args:
        logits: ``(tokens, vocabulary)``.
        ids: ``(tokens, k)``.
        chunk: logits that are processed together; by default as many as suit the device.
    """
    return _LogProbabilities.apply(logits, ids, chunk)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type of sums of losses: fp64, or fp32 where the device has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


class DistillationLoss(NamedTuple):
    """The losses of :func:`distillation_loss`, summed over tokens: numbers that stay on the device, in fp64 where it
    has that.

    Args:
        kl: ``KL(teacher || student)``.
        cross_entropy: the student's cross-entropy with the labels, or 0.
        gradient: of ``kl + weight * cross_entropy`` with respect to the student's logits, in their type.
    """

    kl: Tensor
    cross_entropy: Tensor
    gradient: Tensor | None


@torch.no_grad()
def distillation_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor | None = None,
    weight: float = 0.0,
    with_gradient: bool = True,
    chunk: int | None = None,
) -> DistillationLoss:
    """``KL(teacher || student)``, the cross-entropy with the labels, and their gradient.

    Args:
        teacher: logits ``(tokens, vocabulary)``.
        student: logits ``(tokens, vocabulary)``.
        labels: the next tokens, ``(tokens,)``; -100 is ignored; ``None`` ignores all.
        weight: of the cross-entropy in the gradient.
        with_gradient: compute the gradient.
        chunk: logits that are processed together; by default as many as suit the device.
    """
    gradient = torch.empty_like(student) if with_gradient else None
    labels = torch.full((len(student),), -100) if labels is None else labels
    labels = labels.to(student.device)[:, None]
    kl, cross_entropy = torch.zeros(2, dtype=sum_dtype(student.device), device=student.device)
    for rows in _chunks(student, chunk):
        log_p, log_q = (_wide(logits[rows]).log_softmax(-1) for logits in (teacher, student))
        labelled, ids = (labels[rows] >= 0).to(log_q), labels[rows].clamp_min(0)
        cross_entropy -= (labelled * log_q.gather(-1, ids)).sum()
        p = log_p.exp()
        kl += (p * log_p.sub_(log_q)).sum()
        if gradient is not None:
            q = log_q.exp_()
            if weight:
                q *= 1 + weight * labelled
                q.scatter_add_(-1, ids, -weight * labelled)
            gradient[rows] = q.sub_(p)
    return DistillationLoss(kl, cross_entropy, gradient)


class TokenDivergence(NamedTuple):
    """The result of :func:`token_divergence`, each ``(tokens,)``.

    Args:
        kl: ``KL(teacher || student)`` of the whole vocabulary, in nats.
        teacher_log_p: the teacher's logarithmic probability of the label.
        student_log_p: the student's.
        same_top: whether both have the same most likely token.
    """

    kl: Tensor
    teacher_log_p: Tensor
    student_log_p: Tensor
    same_top: Tensor


@torch.no_grad()
def token_divergence(
    teacher: Tensor, student: Tensor, labels: Tensor, dtype: torch.dtype = torch.float64
) -> TokenDivergence:
    """Divergence of two predictions token by token.

    Sums over a vocabulary of tens of thousands drift in fp32 by more than a millionth; fp64 takes twice the time.

    Args:
        teacher: logits ``(tokens, vocabulary)``.
        student: logits ``(tokens, vocabulary)``.
        labels: the next tokens, ``(tokens,)``.
        dtype: of the computation; fp32 where the device has no fp64.
    """
    exact = torch.float32 if student.device.type == "mps" else dtype
    pieces = []
    for chunk in _chunks(student):
        log_p, log_q = (logits[chunk].to(exact).log_softmax(-1) for logits in (teacher, student))
        teacher_log_p, student_log_p = (log.gather(-1, labels[chunk, None])[:, 0] for log in (log_p, log_q))
        same_top = teacher[chunk].argmax(-1) == student[chunk].argmax(-1)
        kl = log_p.exp().mul_(log_p.sub_(log_q)).sum(-1)
        pieces.append(TokenDivergence(kl, teacher_log_p, student_log_p, same_top))
    return TokenDivergence(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


class _LogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, chunk: int | None) -> Tensor:
        totals = [_wide(logits[rows]).logsumexp(-1) for rows in _chunks(logits, chunk)]
        total = torch.cat(totals) if totals else _wide(logits[:, 0])
        ctx.save_for_backward(logits, ids, total)
        ctx.chunk = chunk
        return _wide(logits.gather(-1, ids)) - total[:, None]

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None]:
        (output_gradient,) = output_gradients
        logits, ids, total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _chunks(logits, ctx.chunk):
            softmax = (_wide(logits[rows]) - total[rows, None]).exp_()
            softmax *= -output_gradient[rows].sum(-1, keepdim=True)
            gradient[rows] = softmax.scatter_add_(-1, ids[rows], output_gradient[rows])
        return gradient, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chunks(logits: Tensor, chunk: int | None = None) -> Iterator[slice]:
    chunk = chunk or (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK)
    rows = max(chunk // logits.shape[-1], 1)
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)
