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
        longest_line: characters of a line of text at most: a file without line ends would fill the memory before its
            first row is known.
        longest_list: characters of a JSON file that holds a list of rows at most: it is read as a whole.
        longest_text: characters of a text that perplexity is measured on at most: it is tokenised as a whole, which
            takes about a hundred bytes a character.
        segment: characters after which a plain text file is cut at the next line end, so that a long file can be
            shuffled.
        template_seconds: seconds that a chat template may take for one conversation; milliseconds are usual.
        generation_round: documents of a round, which is generated together where memory allows, filtered, and kept for
            a resumed run.
        equal_cost_ratio: a pair of widths of equal layers is worth a trial if it costs at most so many times what the
            cheapest does. Costs are extrapolated from one trial plan: on SmolLM2 at 20% two pairs cost the same to
            0.4%, and one loses 1.17 to 1.40 times as much as the other on text (docs/lab-notes.md).
        first_context: tokens that llama.cpp opens a GGUF file for; a longer window opens it anew.
    """

    min_training_tokens: int = 32768
    step_tokens: int = 512
    max_lr: float = 2.6e-3
    save_interval_s: float = 600.0
    shard_bytes: int = 5 * 10**9
    degenerate_share: float = 0.9
    longest_line: int = 1 << 27
    longest_list: int = 1 << 30
    longest_text: int = 1 << 25
    segment: int = 1 << 16
    template_seconds: float = 10
    generation_round: int = 128
    equal_cost_ratio: float = 1.5
    first_context: int = 512


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
