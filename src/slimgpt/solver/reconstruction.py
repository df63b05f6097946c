"""The repair in closed form: least squares for the columns that stay."""

from __future__ import annotations

import torch
from torch import Tensor


def reconstruct(G: Tensor, H: Tensor, columns: Tensor) -> Tensor:
    """``W' = G_:K (H_KK)^-1``, the minimiser of ``E || target - W' x_K ||^2``.

    Args:
        G: ``(out, n)``, ``E[target x^T]``. With ``G = W H`` the target is the layer's own output and ``W'`` is
            what Optimal Brain Surgeon arrives at after removing the other columns in any order.
        H: ``(n, n)``, the damped Hessian.
        columns: ``(kept,)`` long, the columns ``K`` that stay.

    Returns:
        ``(out, kept)``.

    Raises:
        torch.linalg.LinAlgError: ``H_KK`` is not positive definite.
    """
    columns = columns.to(H.device)
    # The block is symmetric: its transpose is the column order in which LAPACK works in place, without a copy.
    L = H[columns.unsqueeze(1), columns].mT
    torch.linalg.cholesky(L, out=L)
    half = torch.linalg.solve_triangular(L.mT, G[:, columns], upper=True, left=False)  # half L^T = G_K
    return torch.linalg.solve_triangular(L, half, upper=False, left=False, out=half)  # W' L = half


def relative_error(W: Tensor, W_kept: Tensor, H: Tensor, columns: Tensor, G: Tensor | None = None) -> float:
    """``E || W x - W' x_K ||^2 / E || W x ||^2``, from the undamped ``H``; 0 if the layer's output is zero.

    The square is multiplied out, ``tr W H W^T - 2 tr W' (W H)_K^T + tr W' H_KK W'^T``, so that ``W H`` serves twice.

    Args:
        G: ``W H``, if the caller has it.
    """
    columns = columns.to(H.device)
    G = W @ H if G is None else G
    W_kept = W_kept.to(G)
    total = _inner(G, W)
    error = total - 2 * _inner(G[:, columns], W_kept) + _inner(W_kept @ H[columns.unsqueeze(1), columns], W_kept)
    # Rounding can leave a tiny negative number where the error is zero.
    return max(error / total, 0.0) if total > 0 else 0.0


def _inner(a: Tensor, b: Tensor) -> float:
    """``sum(a * b)``, added up by rows in the tensors' type and then in fp64."""
    rows = (a * b).sum(1)
    return float(rows.sum() if rows.device.type == "mps" else rows.double().sum())
