"""The Hessian of the layer-wise problem, ``H = E[x x^T]``, accumulated batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Gram:
    """Running sum of ``x x^T`` over tokens, in fp32 (or fp64 when the inputs are).

    Args:
        size: number of input features of the matrix that is to be pruned.
        device: where the ``(size, size)`` sum lives.
        dtype: accumulation type.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.sum = torch.zeros(size, size, device=device, dtype=dtype)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add every row of ``x``, shape ``(..., size)``."""
        x = x.reshape(-1, x.shape[-1]).to(self.sum.dtype)  # (tokens, size)
        self.sum.addmm_(x.T, x)
        self.count += x.shape[0]

    def merge(self, other: Gram) -> None:
        """Add the partial sum of other tokens, as if they had been given to :meth:`add`."""
        self.sum += other.sum.to(self.sum)
        self.count += other.count

    def mean(self) -> Tensor:
        """``H = E[x x^T]``, shape ``(size, size)``.

        Raises:
            ValueError: no token has been added.
        """
        if self.count == 0:
            raise ValueError("the Gram matrix has seen no tokens")
        return self.sum / self.count


def damp(H: Tensor, damping: float) -> Tensor:
    """``H + damping * mean(diag H) * I``; the diagonal of features that were always zero becomes 1.

    A dead feature carries no information: with a unit diagonal it is uncorrelated with everything and its
    removal changes nothing else. The input is left as it was.
    """
    H = H.clone()
    diagonal = H.diagonal()  # a view
    dead = diagonal == 0
    level = damping * diagonal.mean()
    diagonal += level
    diagonal[dead] = 1.0
    return H
