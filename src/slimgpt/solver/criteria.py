"""Criteria by which units stay: the paper's method, ours, and the baselines people compare with.

A criterion answers two questions, which heads stay and which channels stay, and says whether its authors
repair the weights that remain. Repair matters more than selection, so it can be switched for every one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from slimgpt.solver.obs import constant_group_sizes, select_channels, select_heads
from slimgpt.solver.top_k import top_per_group


class SelectHeads(Protocol):
    """``(W, H, units, keep, groups, generator) -> kept heads``, sorted; arguments as in ``select_heads``."""

    def __call__(
        self, W: Tensor, H: Tensor, units: int, keep: int, groups: int, generator: torch.Generator
    ) -> Tensor: ...


class SelectChannels(Protocol):
    """``(W, H, keep, generator) -> kept channels``, sorted; arguments as in ``select_channels``."""

    def __call__(self, W: Tensor, H: Tensor, keep: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class Criterion:
    """Choice of units by a method, and whether it repairs what stays.

    Args:
        damped: whether it chooses by the damped Hessian, as all that invert it must, or by ``E[x x^T]`` as it is.
    """

    heads: SelectHeads
    channels: SelectChannels
    repair: bool
    source: str
    damped: bool = True


def magnitude(W: Tensor, H: Tensor, generator: torch.Generator) -> Tensor:
    """``|| W_j ||^2`` of every column, ``(n,)``."""
    return W.square().sum(0)


def wanda(W: Tensor, H: Tensor, generator: torch.Generator) -> Tensor:
    """``sum_rows |W_ij| sqrt(E[x_j^2])`` of every column, ``(n,)`` (Sun et al., arXiv 2306.11695, summed over
    rows as FLAP's structured variant does)."""
    return W.abs().sum(0) * H.diagonal().sqrt()


def random(W: Tensor, H: Tensor, generator: torch.Generator) -> Tensor:
    """A number from the seed for every column, ``(n,)``."""
    return torch.rand(W.shape[1], generator=generator).to(W.device)


Score = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _top_heads(
    score: Score, W: Tensor, H: Tensor, units: int, keep: int, groups: int, generator: torch.Generator
) -> Tensor:
    """The heads with the highest sums of column scores, the same number from every group."""
    scores = score(W, H, generator).view(groups, units // groups, -1).sum(-1)  # (groups, heads per group)
    return top_per_group(scores, keep // groups)


def _top_channels(score: Score, W: Tensor, H: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    return score(W, H, generator).topk(keep).indices.sort().values.cpu()


def _obs_heads(score, W, H, units, keep, groups, generator):
    return select_heads(W, H, units, keep, groups, score)


def _obs_channels(W, H, keep, generator):
    return select_channels(W, H, keep)


def _constant_groups(W, H, keep, generator):
    return select_channels(W, H, keep, constant_group_sizes(W.shape[1] - keep))


def _baseline(score: Score, source: str) -> Criterion:
    return Criterion(partial(_top_heads, score), partial(_top_channels, score), False, source, damped=False)


CRITERIA: dict[str, Criterion] = {
    "slimgpt": Criterion(partial(_obs_heads, "exact"), _obs_channels, True, "SlimGPT with the exact cost of a head"),
    "paper": Criterion(
        partial(_obs_heads, "grouped_cholesky"), _obs_channels, True, "SlimGPT as published, arXiv 2412.18110"
    ),
    "paper-no-gcd": Criterion(
        partial(_obs_heads, "diagonal"), _obs_channels, True, "ablation: heads scored without the grouped Cholesky"
    ),
    "paper-no-dgs": Criterion(
        partial(_obs_heads, "grouped_cholesky"), _constant_groups, True, "ablation: groups of one constant size"
    ),
    "magnitude": _baseline(magnitude, "norm of the output matrix's columns"),
    "wanda": _baseline(wanda, "Wanda, arXiv 2306.11695, summed over structures"),
    "reap": _baseline(wanda, "REAP, arXiv 2510.13999, for whole experts; what is left over goes by Wanda"),
    "random": _baseline(random, "seeded random choice"),
}
