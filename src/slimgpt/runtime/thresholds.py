"""Sizes and times from which something is done or done otherwise, so that tests can have them small."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Thresholds:
    """Thresholds that no option sets.

    Args:
        min_training_tokens: so many calibration tokens there must be for a training that nobody asked for.
        step_tokens: tokens of a training step, at least.
        max_lr: largest relative change of a matrix by a training step, as a share of its root mean square and for a
            divergence of one nat.
        save_interval_s: seconds between two saved states of a training.
        shard_bytes: bytes from which a checkpoint is written in shards.
        degenerate_share: share of questions with the same answer from which a score counts as degenerate.
    """

    min_training_tokens: int = 32768
    step_tokens: int = 512
    max_lr: float = 2.6e-3
    save_interval_s: float = 600.0
    shard_bytes: int = 5 * 10**9
    degenerate_share: float = 0.9


_DEFAULT = Thresholds()
_current: ContextVar[Thresholds] = ContextVar("thresholds", default=_DEFAULT)


def thresholds() -> Thresholds:
    """The thresholds in force."""
    return _current.get()


@contextmanager
def other_thresholds(**values: Any) -> Iterator[None]:
    """Replace some thresholds inside a ``with`` block, in this thread.

    Args:
        values: fields of :class:`Thresholds`.
    """
    token = _current.set(replace(_current.get(), **values))
    try:
        yield
    finally:
        _current.reset(token)
