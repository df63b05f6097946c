"""Windows of the trial run, and those that predictions are compared on."""

from __future__ import annotations

from torch import Tensor

PROBE_TOKENS, PROBE_LENGTH = 4096, 512
"""Tokens whose predictions are compared, and the longest window of them."""

FIT_TOKENS, FIT_PER_COLUMN = 8192, 4
"""Tokens of the trial run: the larger of a total and a number per column of the widest matrix."""


def most_ranks(windows: Tensor, widest: int) -> int:
    """Number of processes that windows can be divided among, at most."""
    return min(map(len, split_windows(windows, widest)))


def split_windows(windows: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    """Disjoint windows for the trial run and (shorter ones) for the comparison of predictions."""
    length = min(windows.shape[1], PROBE_LENGTH)
    count = min(max(PROBE_TOKENS // length, 1), max(len(windows) // 2, 1))
    tokens = max(FIT_TOKENS, FIT_PER_COLUMN * widest)
    most = -(-tokens // windows.shape[1])
    rest = windows[:-count] if len(windows) > count else windows
    return rest[:most], windows[-count:, :length]
