"""The next layer's weights are read by a thread while this one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from slimgpt.models.slicing import State

PAGE = 4096
"""Bytes from one look at a mapped tensor to the next; pages are larger or equal."""


class ReadAhead:
    """Tensors of one layer that are read before they are asked for.

    For a GPU they are copied to pinned memory, from which they get there faster; where the system pins no more, they
    are read when they are asked for. For a CPU, which uses mapped tensors where they are, their pages are looked at,
    so that the disk has brought them.

    Args:
        read: gives a tensor by name; called in a thread.
        mapped: whether a tensor of that name is mapped as it is stored.
        device: where layers run.
    """

    def __init__(self, read: Callable[[str], Tensor], mapped: Callable[[str], bool], device: torch.device):
        self._read, self._mapped, self._pinned = read, mapped, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._future: Future[State] | None = None
        self._names: Sequence[str] = ()

    def start(self, names: Sequence[str]) -> None:
        """Begin with the tensors of the next layer; those before it are forgotten."""
        self._drop()
        self._names, self._future = names, self._thread.submit(self._bring, names)

    def take(self, names: Sequence[str]) -> State:
        """The tensors that are in memory by name, if these are the names that :meth:`start` was given; else none.

        Raises:
            OSError: what reading them gave.
        """
        future = self._future
        if future is None or list(names) != list(self._names):
            self._drop()
            return {}
        self._future = None
        return future.result()

    def _drop(self) -> None:
        """Forget what nobody has taken; what is not begun is not read."""
        if self._future is not None:
            self._future.cancel()
        self._future = None

    def _bring(self, names: Sequence[str]) -> State:
        if self._pinned:
            return self._copied(names)
        for name in names:
            if self._mapped(name):
                look(self._read(name))
        return {}

    def _copied(self, names: Sequence[str]) -> State:
        """Tensors in pinned memory; none where the system refuses it."""
        state = {}
        for name in names:
            tensor = self._read(name)
            try:
                state[name] = tensor.pin_memory()
            except RuntimeError:  # how CUDA says it
                self._pinned = False
                return {}
        return state


def look(tensor: Tensor) -> int:
    """Bring the pages of a mapped tensor into memory; the sum of the bytes that were looked at."""
    return int(tensor.contiguous().flatten().view(torch.uint8)[::PAGE].sum(dtype=torch.long))
