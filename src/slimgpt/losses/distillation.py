"""Losses of recovery, summed over predicted tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgpt.losses.chunked import log_probabilities


def predicted(values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``values`` ``(batch, n, ...)`` that predict a learned token, ``(tokens, ...)``, and those tokens."""
    learned = labels[:, 1:] != -100
    return values[:, :-1][learned], labels[:, 1:][learned]


def text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of ``logits`` ``(tokens, vocabulary)`` with the next tokens, summed."""
    return -log_probabilities(logits, tokens[:, None]).sum()


def divergence(logits: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, summed over tokens.

    The teacher is represented by its ``k`` most likely tokens and one event for the rest of the vocabulary, with the
    remaining probability. This is a lower bound of the exact divergence: 0 for equal models, and equal to it where
    ``k`` is the whole vocabulary.

    Args:
        logits: of the student, ``(tokens, vocabulary)``.
        ids: the teacher's most likely tokens, ``(tokens, k)``.
        log_p: their logarithmic probabilities, ``(tokens, k)``.
    """
    return _divergence(log_probabilities(logits, ids), log_p, ids.shape[-1] < logits.shape[-1])


def text_loss_and_divergence(logits: Tensor, tokens: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`text_loss` and :func:`divergence`, for little more time than one of them takes."""
    log_q = log_probabilities(logits, torch.cat([tokens[:, None], ids], -1))
    return -log_q[:, 0].sum(), _divergence(log_q[:, 1:], log_p, ids.shape[-1] < logits.shape[-1])


def _divergence(log_q: Tensor, log_p: Tensor, rest: bool) -> Tensor:
    log_p = log_p.float()
    p, q = log_p.exp(), log_q.exp()
    total = (p * (log_p - log_q)).sum()
    if rest:
        # Rounding can leave the rest a little below 0.
        rest_p, rest_q = ((1 - mass.sum(-1)).clamp_min(1e-6) for mass in (p, q))
        total = total + (rest_p * (rest_p.log() - rest_q.log())).sum()
    return total


def layer_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``||s - t||^2 / ||t||^2`` of layer outputs ``(tokens, layers, hidden)``, mean over layers, summed over tokens."""
    student, teacher = student.float(), teacher.float()
    norm = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / norm).mean(-1).sum()
