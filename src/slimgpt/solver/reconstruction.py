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
    factor = torch.linalg.cholesky(H[columns][:, columns])
    return torch.cholesky_solve(G[:, columns].T.contiguous(), factor).T.contiguous()


def relative_error(W: Tensor, W_kept: Tensor, H: Tensor, columns: Tensor) -> float:
    """``E || W x - W' x_K ||^2 / E || W x ||^2``, from the undamped ``H``; 0 if the layer's output is zero."""
    difference = W.clone()
    difference[:, columns.to(W.device)] -= W_kept.to(W)
    # sum((D H) * D) = tr(D H D^T); rounding can leave a tiny negative number where the error is zero.
    error = ((difference @ H) * difference).sum().clamp_min(0)
    total = ((W @ H) * W).sum()
    return float(error / total) if float(total) > 0 else 0.0
