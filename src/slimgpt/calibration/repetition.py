"""Measures of repetition, by which text that a model has written is judged; on token ids alone."""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 4
"""Tokens of an n-gram within a document."""

MAX_REPEATED = 0.25
"""Share of repeated n-grams above which a document loops. Web text and encyclopaedias have 0.02 to 0.1, lists 0.2."""

SHARED_NGRAM = 8
"""Tokens of an n-gram that two documents share."""

MAX_SHARED = 0.3
"""Share of n-grams of earlier documents above which a document repeats them."""


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of ``n`` consecutive tokens, in order."""
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]


def repeated_share(ids: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of a document that stood in it before: one less the distinct ones by all; 0 if there is
    none."""
    runs = ngrams(ids, n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def before_the_loop(ids: Sequence[int], n: int = NGRAM, most: float = MAX_REPEATED) -> int:
    """Tokens of the longest beginning whose share of repeated n-grams is at most ``most``."""
    seen: set[tuple[int, ...]] = set()
    longest = min(len(ids), n - 1)
    for count, run in enumerate(ngrams(ids, n), 1):
        seen.add(run)
        if 1 - len(seen) / count <= most:
            longest = count + n - 1
    return longest


class SeenText:
    """The n-grams of the documents that were taken, to tell a document that repeats them."""

    def __init__(self, n: int = SHARED_NGRAM):
        self.n = n
        self._seen: set[int] = set()

    def shared_share(self, ids: Sequence[int]) -> float:
        """Share of the n-grams of a document that documents taken before have; 0 if there is none."""
        runs = ngrams(ids, self.n)
        return sum(hash(run) in self._seen for run in runs) / len(runs) if runs else 0.0

    def add(self, ids: Sequence[int]) -> None:
        """Take a document."""
        self._seen.update(map(hash, ngrams(ids, self.n)))
