"""Losses of a step of the training after pruning."""

from __future__ import annotations

from typing import NamedTuple, Self

from torch import Tensor


class Losses(NamedTuple):
    """The losses per compared token."""

    kl: float
    cross_entropy: float

    @classmethod
    def of(cls, figures: Tensor) -> Self:
        """From sums of both and the numbers of tokens that they are over, ``(4,)``; waits for the device."""
        kl, cross_entropy, tokens, followed = figures.cpu().tolist()
        return cls(kl / max(tokens, 1), cross_entropy / max(followed, 1))

    def loss(self, text: float) -> float:
        """The objective."""
        return self.kl + text * self.cross_entropy
