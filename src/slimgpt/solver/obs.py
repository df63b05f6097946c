"""Batched Greedy Pruning (SlimGPT, section 3.2) on the Optimal Brain Surgeon framework.

Both selections walk the same three steps: score what is live, remove the cheapest, then repair ``W`` and
down-date ``H^-1`` to the problem that remains,

    W    -= W_g (H^-1_gg)^-1 H^-1_g:            H^-1 -= H^-1_:g (H^-1_gg)^-1 H^-1_g:

They return *which* columns stay. The weights that stay are computed once, afterwards, from the normal
equations (:func:`slimgpt.solver.reconstruct`), which gives the same matrix without the rounding of many
small steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

HeadScore = Literal["exact", "grouped_cholesky", "diagonal"]


def inverse(H: Tensor) -> Tensor:
    """``H^-1`` of a symmetric positive definite matrix, by Cholesky.

    Raises:
        torch.linalg.LinAlgError: ``H`` is not positive definite; nothing is tried in its place.
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(H))


def eliminate(W: Tensor, H_inv: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove ``columns``: ``W`` repaired, ``H^-1`` down-dated, and the indices of the columns that are left.

    Args:
        W: ``(out, n)``.
        H_inv: ``(n, n)``, the inverse for these columns.
        columns: ``(k,)`` long, the columns to remove.

    Returns:
        ``(out, n - k)``, ``(n - k, n - k)`` and ``(n - k,)`` long, sorted.
    """
    rest = _without(W.shape[1], columns)
    rows = H_inv[columns]  # (k, n)
    factor = torch.linalg.cholesky(rows[:, columns])
    rows = rows[:, rest]
    step = torch.cholesky_solve(rows, factor)  # (H^-1_gg)^-1 H^-1_g:, (k, n - k)
    W = torch.addmm(W[:, rest], W[:, columns], step, alpha=-1)
    return W, H_inv[rest][:, rest].addmm_(rows.T, step, alpha=-1), rest


def head_scores(W: Tensor, blocks: Tensor, score: HeadScore) -> Tensor:
    """The cost of removing each head, shape ``(heads,)``.

    Args:
        W: ``(out, heads, d)``, columns of the output matrix by head.
        blocks: ``(heads, d, d)``, the diagonal blocks of ``H^-1``.
        score: ``exact`` is the cost of the group, ``|| L^-1 W_u^T ||_F^2`` with ``L L^T`` the block;
            ``grouped_cholesky`` is the paper's ``sum_rows sum_j W_j^2 / L_jj^2``; ``diagonal`` is its ablation
            "-GCD", ``sum_rows sum_j W_j^2 / (H^-1)_jj``.
    """
    by_head = W.permute(1, 2, 0)  # (heads, d, out)
    if score == "diagonal":
        return (by_head.square().sum(-1) / blocks.diagonal(dim1=-2, dim2=-1)).sum(-1)
    L = torch.linalg.cholesky(blocks)  # (heads, d, d)
    if score == "grouped_cholesky":
        return (by_head.square().sum(-1) / L.diagonal(dim1=-2, dim2=-1).square()).sum(-1)
    return torch.linalg.solve_triangular(L, by_head, upper=False).square().sum((-2, -1))


def select_heads(W: Tensor, H: Tensor, units: int, keep: int, groups: int = 1, score: HeadScore = "exact") -> Tensor:
    """Greedy choice of the heads that stay, one head at a time.

    Args:
        W: ``(out, n)``, the output matrix.
        H: ``(n, n)``, its damped Hessian.
        units: number of heads; each owns ``n / units`` neighbouring columns.
        keep: how many heads stay.
        groups: neighbouring heads form ``groups`` groups of equal size, and every group loses the same number
            (query heads that share a KV head). 1 leaves the choice free.
        score: see :func:`head_scores`.

    Returns:
        The kept heads, sorted, ``(keep,)`` long.

    Raises:
        ValueError: ``units`` does not divide ``n``, or the removal does not divide among the groups.
        torch.linalg.LinAlgError: ``H`` is not positive definite.
    """
    n = W.shape[1]
    if n % units or units % groups or keep % groups or not 0 < keep <= units:
        raise ValueError(f"cannot keep {keep} of {units} heads in {groups} groups over {n} columns")
    d = n // units
    live = torch.arange(units, device=W.device)
    if keep == units:
        return live.cpu()
    H_inv = inverse(H)
    lost = torch.zeros(groups, dtype=torch.long, device=W.device)  # heads that each group has lost
    while len(live) > keep:
        blocks = H_inv.view(len(live), d, len(live), d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        scores = head_scores(W.view(-1, len(live), d), blocks, score)
        # Groups take turns: one that is ahead of another waits, so that all end equal.
        group = live * groups // units
        scores[lost[group] > lost.min()] = torch.inf
        position = int(scores.argmin())
        columns = torch.arange(position * d, (position + 1) * d, device=W.device)
        W, H_inv, _ = eliminate(W, H_inv, columns)
        lost[group[position]] += 1
        live = live[_without(len(live), torch.tensor([position], device=W.device))]
    return live.cpu()


def group_sizes(remove: int, largest: int = 1024, smallest: int = 8) -> list[int]:
    """Dynamic Group Size: how many channels each step removes.

    The first group is half of what is to be removed, at most ``largest``; every next one is half of the one
    before, down to ``smallest``. The sizes add up to ``remove``.
    """
    sizes: list[int] = []
    size = max(min(remove // 2, largest), smallest)
    while remove > 0:
        sizes.append(min(size, remove))
        remove -= sizes[-1]
        size = max(size // 2, smallest)
    return sizes


def select_channels(W: Tensor, H: Tensor, keep: int, sizes: Sequence[int] | None = None) -> Tensor:
    """Greedy choice of the channels that stay, a group at a time, by ``sum_rows W_j^2 / (H^-1)_jj``.

    Args:
        W: ``(out, n)``, the output matrix.
        H: ``(n, n)``, its damped Hessian.
        keep: how many channels stay.
        sizes: channels removed per step, adding up to ``n - keep``; default :func:`group_sizes`.

    Returns:
        The kept channels, sorted, ``(keep,)`` long.

    Raises:
        ValueError: ``keep`` or ``sizes`` do not fit ``n``.
        torch.linalg.LinAlgError: ``H`` is not positive definite.
    """
    n = W.shape[1]
    sizes = group_sizes(n - keep) if sizes is None else list(sizes)
    if not 0 < keep <= n or sum(sizes) != n - keep:
        raise ValueError(f"groups {sizes} do not remove {n - keep} of {n} channels")
    live = torch.arange(n, device=W.device)
    H_inv = inverse(H) if sizes else H
    for step, size in enumerate(sizes):
        scores = W.square().sum(0) / H_inv.diagonal()
        columns = scores.topk(size, largest=False).indices
        if step + 1 == len(sizes):  # the last removal needs no repair: the caller solves for the weights
            return live[_without(len(live), columns)].cpu()
        W, H_inv, rest = eliminate(W, H_inv, columns)
        live = live[rest]
    return live.cpu()


def _without(n: int, columns: Tensor) -> Tensor:
    """The indices ``0..n-1`` that are not in ``columns``, sorted."""
    mask = torch.ones(n, dtype=torch.bool, device=columns.device)
    mask[columns] = False
    return mask.nonzero().squeeze(1)
