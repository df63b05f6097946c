"""Batched Greedy Pruning (SlimGPT, section 3.2) on the Optimal Brain Surgeon framework.

Both selections walk the same three steps: score what is live, remove the cheapest, then repair ``W`` and
down-date ``H^-1`` to the problem that remains,

    W    -= W_g (H^-1_gg)^-1 H^-1_g:            H^-1 -= H^-1_:g (H^-1_gg)^-1 H^-1_g:

Selections return *which* columns stay. The weights that stay are computed once, afterwards, from the normal
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
    """``H^-1`` of a symmetric positive definite matrix, by Cholesky; one new matrix is allocated.

    Raises:
        torch.linalg.LinAlgError: ``H`` is not positive definite; nothing is tried in its place.
    """
    factor = torch.linalg.cholesky(H)
    return torch.cholesky_inverse(factor, out=factor)


class Elimination:
    """Columns leave one group after another; ``W`` is repaired and ``H^-1`` down-dated.

    ``H^-1`` itself is never written. With ``L L^T = H^-1_gg`` a removal adds the rows ``L^-1 H^-1_g:`` to a matrix
    ``U``, and the inverse of what remains is ``H^-1 - U^T U``. So nothing quadratic is copied or rewritten: a step
    reads the rows of its group and ``U``. (``U`` is the partial Cholesky factor of ``H^-1`` in the order of removal.)

    Args:
        W: ``(out, n)``, the output matrix; copied.
        H_inv: ``(n, n)``, the inverse of its damped Hessian; read only.
        most: how many columns will be removed altogether.

    Attributes:
        columns: ``(n, out)``, the repaired ``W`` transposed (a column's numbers lie together: norms are fast);
            the columns that have left are zero.
        live: ``(n,)`` bool, the columns that are left.
        diagonal: ``(n,)``, the diagonal of the down-dated inverse at the live columns.
    """

    def __init__(self, W: Tensor, H_inv: Tensor, most: int):
        n = W.shape[1]
        self.columns = W.T.clone(memory_format=torch.contiguous_format)
        self.live = torch.ones(n, dtype=torch.bool, device=W.device)
        self.diagonal = H_inv.diagonal().clone()
        self.removed = 0
        self._H_inv = H_inv
        self._U = W.new_empty(most, n)

    def rows(self, group: Tensor) -> Tensor:
        """Rows of the down-dated inverse, ``(k, n)``; meaningful at the live columns."""
        U = self._U[: self.removed]
        return torch.addmm(self._H_inv[group], U[:, group].T, U, alpha=-1)

    def remove(self, group: Tensor) -> Tensor:
        """Remove the live columns ``group``, ``(k,)`` long, and return the new rows of ``U``, ``(k, n)``."""
        rows = self.rows(group)
        factor = torch.linalg.cholesky(rows[:, group])
        new = torch.linalg.solve_triangular(factor, rows, upper=False)  # L^-1 H^-1_g:
        new *= self.live  # what is left of removed columns is rounding
        shares = torch.linalg.solve_triangular(factor, self.columns[group], upper=False)  # L^-1 W_g^T, (k, out)
        self.columns.addmm_(new.T, shares, alpha=-1)
        self.columns[group] = 0.0
        self.live[group] = False
        self.diagonal -= new.square().sum(0)
        self._U[self.removed : self.removed + len(group)] = new
        self.removed += len(group)
        return new


def head_scores(columns: Tensor, blocks: Tensor, score: HeadScore) -> Tensor:
    """The cost of removing each head, shape ``(heads,)``.

    Args:
        columns: ``(heads, d, out)``, the columns of the output matrix by head.
        blocks: ``(heads, d, d)``, the diagonal blocks of ``H^-1``.
        score: ``exact`` is the cost of the group, ``|| L^-1 W_u^T ||_F^2`` with ``L L^T`` the block;
            ``grouped_cholesky`` is the paper's ``sum_rows sum_j W_j^2 / L_jj^2``; ``diagonal`` is its ablation
            "-GCD", ``sum_rows sum_j W_j^2 / (H^-1)_jj``.
    """
    if score == "diagonal":
        return (columns.square().sum(-1) / blocks.diagonal(dim1=-2, dim2=-1)).sum(-1)
    L = torch.linalg.cholesky(blocks)  # (heads, d, d)
    if score == "grouped_cholesky":
        return (columns.square().sum(-1) / L.diagonal(dim1=-2, dim2=-1).square()).sum(-1)
    return torch.linalg.solve_triangular(L, columns, upper=False).square().sum((-2, -1))


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
    blocks = H_inv.view(units, d, units, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # (units, d, d)
    step = Elimination(W, H_inv, (units - keep) * d)
    alive = torch.ones(units, dtype=torch.bool, device=W.device)
    lost = torch.zeros(groups, dtype=torch.long, device=W.device)  # heads that each group has lost
    for _ in range(units - keep):
        # Groups take turns: one that is ahead of another waits, so that all end equal.
        group = live * groups // units
        candidates = (alive & (lost[group] == lost.min())).nonzero().squeeze(1)
        scores = head_scores(step.columns.view(units, d, -1)[candidates], blocks[candidates], score)
        head = candidates[scores.argmin()]
        new = step.remove(head * d + torch.arange(d, device=W.device)).view(d, units, d).transpose(0, 1)
        blocks.baddbmm_(new.mT, new, alpha=-1)
        alive[head] = False
        lost[group[head]] += 1
    return alive.nonzero().squeeze(1).cpu()


def group_sizes(remove: int, largest: int = 1024, smallest: int | None = None) -> list[int]:
    """Dynamic Group Size: how many channels each step removes.

    The first group is half of what is to be removed, at most ``largest``; every next one is half of the one
    before, down to ``smallest``. The sizes add up to ``remove``.

    Args:
        smallest: by default 8, or 1/256 of ``remove`` where that is more, so that very wide layers take no more
            than some 300 steps.
    """
    sizes: list[int] = []
    smallest = max(8, remove // 256) if smallest is None else smallest
    size = max(min(remove // 2, largest), smallest)
    while remove > 0:
        sizes.append(min(size, remove))
        remove -= sizes[-1]
        size = max(size // 2, smallest)
    return sizes


def constant_group_sizes(remove: int, size: int = 128) -> list[int]:
    """The paper's ablation "-DGS": every step removes ``size`` channels, the last one the rest."""
    return [min(size, remove - start) for start in range(0, remove, size)]


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
    if not sizes:
        return torch.arange(n)
    step = Elimination(W, inverse(H), n - keep - sizes[-1])
    for size in sizes[:-1]:
        step.remove(_cheapest(step, size))
    # The last removal needs no repair: the caller solves for the weights.
    step.live[_cheapest(step, sizes[-1])] = False
    return step.live.nonzero().squeeze(1).cpu()


def _cheapest(step: Elimination, size: int) -> Tensor:
    """The ``size`` live columns with the lowest ``sum_rows W_j^2 / (H^-1)_jj``."""
    scores = torch.linalg.vector_norm(step.columns, dim=1).square() / step.diagonal
    return scores.masked_fill_(~step.live, torch.inf).topk(size, largest=False).indices
