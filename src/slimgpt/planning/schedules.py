"""Incremental Pruning Ratio (SlimGPT, section 3.3): which share of its parameters each layer loses."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slimgpt.errors import PlanError

FIRST_SHARE = 0.3125
"""``r_first / ratio`` of the paper's 20% run on 32 layers (0.0625 -> 0.25)."""


def _log(n: int) -> list[float]:
    return [math.log(1 + i) / math.log(n) if n > 1 else 1.0 for i in range(n)]


def _linear(n: int) -> list[float]:
    return [i / (n - 1) if n > 1 else 1.0 for i in range(n)]


def _between(shape: list[float], ratio: float) -> list[float]:
    """``r_first + (r_last - r_first) * shape`` with mean ``ratio``, from ``r_first = FIRST_SHARE * ratio``.

    Where ``r_last`` would pass 1, the curve is flattened instead: it ends at the middle between the ratio and 1.
    """
    mean = sum(shape) / len(shape)
    if mean in (0.0, 1.0):
        return [ratio] * len(shape)
    last = ratio * (FIRST_SHARE + (1 - FIRST_SHARE) / mean)
    first = ratio * FIRST_SHARE
    if last >= (1 + ratio) / 2:
        last = (1 + ratio) / 2
        first = (ratio - last * mean) / (1 - mean)
    return [first + (last - first) * s for s in shape]


def log_increase(n: int, ratio: float) -> list[float]:
    """``r_i = r_first + (r_last - r_first) ln(1 + i) / ln(n)``: little at first, most of the rise early."""
    return _between(_log(n), ratio)


def linear_increase(n: int, ratio: float) -> list[float]:
    """``r_i = r_first + (r_last - r_first) i / (n - 1)``."""
    return _between(_linear(n), ratio)


def uniform(n: int, ratio: float) -> list[float]:
    """The same ratio for every layer."""
    return [ratio] * n


def log_decrease(n: int, ratio: float) -> list[float]:
    """The ratios of :func:`log_increase` from the last layer to the first."""
    return log_increase(n, ratio)[::-1]


def linear_decrease(n: int, ratio: float) -> list[float]:
    """The ratios of :func:`linear_increase` from the last layer to the first."""
    return linear_increase(n, ratio)[::-1]


RATIOS = {
    "log_increase": log_increase,
    "linear_increase": linear_increase,
    "uniform": uniform,
    "log_decrease": log_decrease,
    "linear_decrease": linear_decrease,
}
"""The strategies the paper compares, by name."""

DEFAULT_RATIO = 0.2


def layer_ratios(schedule: str | Sequence[float], n: int, ratio: float | None = None) -> list[float]:
    """The ratio of every layer.

    Args:
        schedule: a key of :data:`RATIOS`, or one ratio per layer.
        n: number of layers.
        ratio: their mean; 0.2 if not given. With a list it may be left out, else it must agree with the list.

    Raises:
        PlanError: an unknown name, a ratio outside (0, 1), or a list that does not fit.
    """
    if ratio is not None and not 0 < ratio < 1:
        raise PlanError(f"ratio {ratio:g} is outside (0, 1): it is the share of the decoder layers to remove")
    if isinstance(schedule, str):
        if schedule not in RATIOS:
            raise PlanError(
                f"schedule '{schedule}' is unknown; choose {', '.join(RATIOS)}, or give one ratio per layer: a,b,c"
            )
        return RATIOS[schedule](n, DEFAULT_RATIO if ratio is None else ratio)
    ratios = [float(r) for r in schedule]
    if len(ratios) != n:
        raise PlanError(f"the schedule lists {len(ratios)} ratios, but the model has {n} layers")
    for i, r in enumerate(ratios):
        if not 0 <= r < 1:
            raise PlanError(f"layer {i}: ratio {r:g} is outside [0, 1); at 1 the layer would keep no head")
    mean = sum(ratios) / n
    if mean == 0:
        raise PlanError("every listed ratio is 0: there is nothing to remove")
    if ratio is not None and abs(mean - ratio) > 0.002:
        raise PlanError(
            f"the listed ratios have mean {mean:.4f}, but --ratio asks for {ratio:g}; leave one of them out"
        )
    return ratios
