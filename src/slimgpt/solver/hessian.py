"""The Hessian of the layer-wise problem, ``H = E[x x^T]``, accumulated batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 512
"""Default number of columns that are multiplied together; blocks below the diagonal are left out."""


class Gram:
    """Running sum of ``x x^T`` over tokens.

    Only blocks on and above the diagonal are multiplied: with many blocks, half of the work. Products of 16-bit
    numbers are exact in fp32; on CUDA they are left to the tensor cores, which accumulate in fp32. Each call's
    products are summed in fp32 (fp64 when the inputs are), the calls in ``dtype``.

    Args:
        size: number of input features of the matrix that is to be pruned.
        device: where the ``(size, size)`` sum lives.
        dtype: accumulation type. In fp64 the order of many batches, and their division among processes, changes
            next to nothing.
        storage: zeros ``(size, size)`` to sum up in, such as a memory-mapped file; made if not given.
        block: columns that are multiplied together.

    Attributes:
        sum: ``(size, size)``; below the diagonal blocks it is not filled in until :meth:`mean`.
        count: tokens added so far.
    """

    def __init__(
        self,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        storage: Tensor | None = None,
        *,
        block: int = BLOCK,
    ):
        self.sum = torch.zeros(size, size, device=device, dtype=dtype) if storage is None else storage
        self.count, self.block = 0, block

    def add(self, x: Tensor) -> None:
        """Add every row of ``x``, shape ``(..., size)``."""
        x = x.reshape(-1, x.shape[-1])  # (tokens, size)
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half and not x.is_cuda:
            x, half = x.float(), False
        for start in range(0, self.sum.shape[0], self.block):
            left, right = x[:, start : start + self.block].T, x[:, start:]
            target = self.sum[start : start + self.block, start:]
            if x.dtype == target.dtype:
                target.addmm_(left, right)
            elif half:
                target += torch.mm(left, right, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
            else:
                target += left @ right
        self.count += x.shape[0]

    def mean(self) -> Tensor:
        """``H = E[x x^T]``, shape ``(size, size)``, symmetric.

        The sum is turned into the mean in place, so as not to hold both: the sum starts anew after it.

        Raises:
            ValueError: no token has been added.
        """
        if self.count == 0:
            raise ValueError("the Gram matrix has seen no tokens")
        H, self.sum = self.sum.div_(self.count), torch.zeros_like(self.sum[:0])
        self.count = 0
        size = H.shape[0]
        for start in range(0, size, self.block):  # what is above the diagonal blocks goes below them
            stop = min(start + self.block, size)
            block = H[start:stop, start:stop].triu()  # not every processor's products are symmetric to the last bit
            H[start:stop, start:stop] = block + block.triu(1).T
            H[stop:, start:stop] = H[start:stop, stop:].T
        return H


def damp(H: Tensor, damping: float) -> Tensor:
    """``H + damping * mean(diag H) * I``; the diagonal of features that were always zero becomes 1.

    A dead feature carries no information: with a unit diagonal it is uncorrelated with everything and its
    removal changes nothing else. ``H`` is changed in place and returned.
    """
    diagonal = H.diagonal()  # a view
    dead = diagonal == 0
    level = damping * diagonal.mean()
    diagonal += level
    diagonal[dead] = 1.0
    return H
