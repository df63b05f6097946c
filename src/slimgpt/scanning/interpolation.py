"""Monotone interpolation of a few measured values."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(frozen=True)
class MonotoneCurve:
    """Piecewise cubic Hermite interpolation that is monotone wherever the values are.

    The slopes are those of F. N. Fritsch and J. Butland, A method for constructing local monotone piecewise cubic
    interpolants, SIAM J. Sci. Stat. Comput. 5 (1984): the weighted harmonic mean of the neighbouring differences; at
    the ends a one-sided formula of three points. Beyond the ends the curve goes on straight.

    Args:
        x: ascending, at least one.
        y: a value for each.

    Raises:
        ValueError: ``x`` is not ascending, or has another length than ``y``.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    slopes: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not self.x or len(self.x) != len(self.y) or any(b <= a for a, b in pairwise(self.x)):
            raise ValueError(f"x = {self.x} must be ascending and have a value each, and y is {self.y}")
        object.__setattr__(self, "slopes", tuple(_slopes(self.x, self.y)))

    def __call__(self, at: float) -> float:
        """The value at a place."""
        x, y, d = self.x, self.y, self.slopes
        if at <= x[0] or at >= x[-1]:
            end = 0 if at <= x[0] else -1
            return y[end] + d[end] * (at - x[end])
        i = bisect_right(x, at) - 1
        h = x[i + 1] - x[i]
        t = (at - x[i]) / h
        rest = 1 - t
        return (
            y[i] * (1 + 2 * t) * rest**2
            + y[i + 1] * (1 + 2 * rest) * t**2
            + h * (d[i] * t * rest**2 - d[i + 1] * rest * t**2)
        )


def _slopes(x: Sequence[float], y: Sequence[float]) -> list[float]:
    h = [b - a for a, b in pairwise(x)]
    delta = [(b - a) / step for (a, b), step in zip(pairwise(y), h)]
    if len(delta) < 2:
        return [delta[0] if delta else 0.0] * len(x)
    inner = []
    for left, right, before, after in zip(h, h[1:], delta, delta[1:]):
        first, second = 2 * right + left, right + 2 * left
        inner.append((first + second) / (first / before + second / after) if before * after > 0 else 0.0)
    return [_end_slope(h[0], h[1], delta[0], delta[1]), *inner, _end_slope(h[-1], h[-2], delta[-1], delta[-2])]


def _end_slope(near: float, far: float, first: float, second: float) -> float:
    """The slope at an end, of the parabola through three points, as far as that is monotone.

    Args:
        near: the width of the interval at the end.
        far: the width of the next.
        first: the difference quotient over the one at the end.
        second: that over the next.
    """
    slope = ((2 * near + far) * first - near * second) / (near + far)
    if slope * first <= 0:
        return 0.0
    if first * second <= 0 and abs(slope) > 3 * abs(first):
        return 3 * first
    return slope


def logit(share: float) -> float:
    """``ln(p / (1 - p))`` of a share, which is kept off 0 and 1 by a millionth."""
    inside = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(inside / (1 - inside))


def expit(value: float) -> float:
    """The share whose :func:`logit` a value is."""
    return 1 / (1 + math.exp(-value))
