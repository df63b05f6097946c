"""KL divergence of a model's predictions from another's, with the statistics of llama.cpp's ``--kl-divergence``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.errors import NumericalError, UsageError
from slimgpt.losses.chunked import TokenDivergence, token_divergence
from slimgpt.models.eval_mode import in_eval_mode

QUANTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
"""Percentages that a :class:`Distribution` has the quantiles of."""


@dataclass(frozen=True)
class Distribution:
    """The distribution of a quantity over predicted tokens.

    Args:
        stderr: standard error of the mean, tokens taken as independent (as llama.cpp does; it is a little too small).
        rms: root mean square.
        quantiles: by percentage, such as ``99%``; between two tokens interpolated linearly.
    """

    mean: float
    stderr: float
    rms: float
    minimum: float
    maximum: float
    quantiles: dict[str, float]

    @property
    def median(self) -> float:
        """The quantile of 50%."""
        return self.quantiles["50%"]

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """The distribution of ``(tokens,)``."""
        quantiles = np.quantile(values.numpy(), [percent / 100 for percent in QUANTILES])
        return cls(
            mean=float(values.mean()),
            stderr=standard_error(values),
            rms=math.sqrt(float(values.square().mean())),
            minimum=float(values.min()),
            maximum=float(values.max()),
            quantiles={f"{percent:g}%": float(value) for percent, value in zip(QUANTILES, quantiles)},
        )


@dataclass(frozen=True)
class PositionDivergence:
    """The divergence of the tokens in one range of positions.

    Args:
        tokens: how many were predicted there.
        kl: mean, in nats per token.
        same_top: share of tokens where both models have the same most likely token.
    """

    tokens: int
    kl: float
    same_top: float


@dataclass(frozen=True)
class Divergence:
    """``KL(base || model)`` of the predictions of the next token, over the tokens that the perplexity is taken over.

    Args:
        base: name of the model that it is taken from.
        kl: in nats per predicted token.
        bits_per_byte: the mean of ``kl`` in bits per byte of UTF-8; compares models of different tokenizers.
        same_top: share of tokens where both models have the same most likely token.
        same_top_stderr: its standard error.
        delta_p: probability of the text's token in the model minus that in the base; llama.cpp's in percent.
        base_perplexity: of the base on the same tokens.
        log_perplexity_ratio: ``ln(perplexity / base_perplexity)``.
        log_perplexity_ratio_stderr: its standard error; the two models' errors on a token belong together.
        correlation: of the two models' logarithmic probabilities of the text's tokens.
        by_position: by the first position of a range that doubles (1, 2-3, 4-7, ...) in the window.
    """

    base: str
    kl: Distribution
    bits_per_byte: float
    same_top: float
    same_top_stderr: float
    delta_p: Distribution
    base_perplexity: float
    log_perplexity_ratio: float
    log_perplexity_ratio_stderr: float
    correlation: float
    by_position: dict[int, PositionDivergence]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)

    @classmethod
    def of(cls, tokens: TokenDivergence, positions: Tensor, base: str, tokens_per_byte: float) -> Self:
        """The divergence over some predicted tokens.

        Args:
            tokens: ``(tokens,)`` each, on the CPU.
            positions: of each in its window, ``(tokens,)``, from 1.
            base: the name of the base.
            tokens_per_byte: of the text.

        Raises:
            NumericalError: a model gave NaN or infinity.
        """
        kl, base_log_p, log_p = (part.double() for part in tokens[:3])
        same = tokens.same_top.double()
        if not bool(torch.isfinite(kl).all()):
            raise NumericalError(
                f"the divergence from {base} holds NaN or infinity: one of the models is damaged, or its numbers are "
                "too large for its type; try float32"
            )
        ratio = base_log_p - log_p
        return cls(
            base=base,
            kl=Distribution.of(kl),
            bits_per_byte=float(kl.mean()) * tokens_per_byte / math.log(2),
            same_top=float(same.mean()),
            same_top_stderr=standard_error(same),
            delta_p=Distribution.of(log_p.exp() - base_log_p.exp()),
            base_perplexity=math.exp(min(-float(base_log_p.mean()), 700.0)),
            log_perplexity_ratio=float(ratio.mean()),
            log_perplexity_ratio_stderr=standard_error(ratio),
            correlation=_correlation(base_log_p, log_p),
            by_position=dict(_by_position(positions, kl, same)),
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`, also after a file."""
        positions = {int(first): PositionDivergence(**row) for first, row in values["by_position"].items()}
        distributions = {name: Distribution(**values[name]) for name in ("kl", "delta_p")}
        return cls(**{**values, **distributions, "by_position": positions})


class DivergenceMeter:
    """Collects some numbers per predicted token, so that logits are there for one batch at a time.

    Args:
        base: the model that the divergence is taken from.
    """

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self.tokens: list[TokenDivergence] = []
        self.positions: list[Tensor] = []

    @torch.no_grad()
    def add(self, model: PreTrainedModel, ids: Tensor, predicted: Tensor) -> Tensor:
        """Run both models on a batch; the model's loss of every token but the first, ``(batch, window - 1)``, in nats.

        Args:
            ids: ``(batch, window)``.
            predicted: which of the tokens count, ``(batch, window - 1)`` bool.

        Raises:
            UsageError: the models predict over different vocabularies.
        """
        student = _logits(model, ids)
        teacher = _logits(self.base, ids.to(self.base.device)).to(student.device)
        if teacher.shape != student.shape:
            raise UsageError(
                f"the model predicts {student.shape[-1]:,} tokens and the one it is held against "
                f"{teacher.shape[-1]:,}; a divergence needs models with the same vocabulary"
            )
        tokens = token_divergence(teacher.flatten(0, 1), student.flatten(0, 1), ids[:, 1:].flatten())
        chosen = predicted.flatten()
        self.tokens.append(TokenDivergence(*(part.cpu()[chosen] for part in tokens)))
        self.positions.append(predicted.nonzero()[:, 1] + 1)
        return -tokens.student_log_p.view(len(ids), -1)

    def result(self, base: str, tokens_per_byte: float) -> Divergence:
        """The divergence over all batches.

        Args:
            base: the name of the base.
            tokens_per_byte: of the text.

        Raises:
            NumericalError: a model gave NaN or infinity.
        """
        tokens = TokenDivergence(*(torch.cat(parts) for parts in zip(*self.tokens, strict=True)))
        return Divergence.of(tokens, torch.cat(self.positions), base, tokens_per_byte)


@in_eval_mode
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of every token but the first, ``(batch, window - 1, vocabulary)``."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``(tokens,)``; 0 for one token."""
    return math.sqrt(float(values.var(correction=0)) / max(len(values) - 1, 1))


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's; 1 for two equal quantities, and 0 where one of two does not vary."""
    spread = float(first.var(correction=0)) * float(second.var(correction=0))
    covariance = float(((first - first.mean()) * (second - second.mean())).mean())
    return min(covariance / math.sqrt(spread), 1.0) if spread > 0 else float(torch.equal(first, second))


def _by_position(positions: Tensor, kl: Tensor, same: Tensor) -> Iterator[tuple[int, PositionDivergence]]:
    first, last = 1, int(positions.max())
    while first <= last:
        inside = (positions >= first) & (positions < 2 * first)
        if count := int(inside.sum()):
            yield first, PositionDivergence(count, float(kl[inside].mean()), float(same[inside].mean()))
        first *= 2
