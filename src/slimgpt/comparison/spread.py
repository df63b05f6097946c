"""Figures that were measured several times: mean, standard deviation, and the standard error of one of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """A figure over several runs.

    Args:
        mean: over the runs.
        deviation: standard deviation over the runs, ``n - 1`` below; 0 for one.
        stderr: standard error of one run, by its questions or tokens, as a mean over the runs; ``None`` where it is not
            known.
        runs: how many there are.
    """

    mean: float
    deviation: float
    stderr: float | None
    runs: int


def spread_of(values: Sequence[float | None], errors: Iterable[float | None]) -> Spread | None:
    """The spread of a figure; ``None`` where a run has none.

    Args:
        values: of every run, at least one.
        errors: the standard error of each.
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    of_one = [error for error in errors if error is not None]
    return Spread(
        mean=mean_of_equal(known),
        deviation=statistics.stdev(known) if len(set(known)) > 1 else 0.0,
        stderr=statistics.fmean(of_one) if len(of_one) == len(known) else None,
        runs=len(known),
    )


def mean_of_equal(values: Sequence[float]) -> float:
    """The mean; of equal values to the bit."""
    return values[0] if len(set(values)) == 1 else statistics.fmean(values)
