"""Rows of tensors divided among processes, and exchanged in one bucket (ZeRO stage 1, arXiv 1910.02054)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from slimgpt.runtime.distributed import Ranks, collective_errors

# Named so from torch 2.13 on, which warns of the former names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RowShards:
    """Every process owns a share of the rows (the first dimension) of every tensor.

    Args:
        ranks: the processes; one alone owns all rows, and nothing is copied.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def own(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor, a view; perhaps none."""
        return self._rows(tensor, self.ranks.rank)

    def start_sum(self, tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to sum tensors of one type over processes; what is returned waits, and gives the sums of own rows."""
        if self.ranks.world == 1 or not tensors:
            return lambda: list(tensors)
        bucket, own_rows = self._bucket(tensors), [self.own(tensor) for tensor in tensors]
        for row, rank in zip(bucket, range(self.ranks.world)):
            _pack(row, [self._rows(tensor, rank) for tensor in tensors])
        summed = torch.empty_like(bucket[0])
        with collective_errors():
            work = _reduce_scatter(summed, bucket.view(-1), group=self.ranks.group, async_op=True)

        def finish() -> list[Tensor]:
            with collective_errors():
                work.wait()  # pyright: ignore[reportOptionalMemberAccess]
            return [part.view(rows.shape) for part, rows in zip(_parts(summed, own_rows), own_rows, strict=True)]

        return finish

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Bring every process's own rows of tensors of one type to all others, in place."""
        if self.ranks.world == 1 or not tensors:
            return
        bucket = self._bucket(tensors)
        own = torch.empty_like(bucket[0])
        _pack(own, [self.own(tensor) for tensor in tensors])
        with collective_errors():
            _all_gather(bucket.view(-1), own, group=self.ranks.group)
        for row, rank in zip(bucket, range(self.ranks.world)):
            rows = [self._rows(tensor, rank) for tensor in tensors]
            for part, target in zip(_parts(row, rows), rows, strict=True):
                target.copy_(part.view(target.shape))

    def _rows(self, tensor: Tensor, rank: int) -> Tensor:
        """A process's rows of a tensor."""
        return tensor[Ranks(rank, self.ranks.world).rows(len(tensor))]

    def _bucket(self, tensors: Sequence[Tensor]) -> Tensor:
        """Room for the rows of every process, ``(processes, numbers)``; the first process has the most."""
        size = sum(self._rows(tensor, 0).numel() for tensor in tensors)
        return torch.zeros(self.ranks.world, size, dtype=tensors[0].dtype, device=tensors[0].device)


def _parts(row: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    sizes = [tensor.numel() for tensor in like]
    return row[: sum(sizes)].split(sizes)


def _pack(row: Tensor, tensors: Sequence[Tensor]) -> None:
    for part, tensor in zip(_parts(row, tensors), tensors, strict=True):
        part.copy_(tensor.reshape(-1))
