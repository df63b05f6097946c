"""Placement of cached activations: device, pinned host memory, a memory-mapped file, or recomputed."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from slimgpt.errors import UsageError
from slimgpt.runtime.distributed import local_world_size

DEVICE, HOST, FILE, RECOMPUTE = "device", "host", "file", "recompute"
M_MMAP_THRESHOLD = -3
"""glibc's number of the size from which a block is mapped by itself."""

USABLE_FRACTION = 0.85
"""Share of the free memory that is used when the user names no budget."""


def anonymous_rss() -> int:
    """Anonymous (not file-backed) resident memory of this process in bytes; all resident memory where the system
    does not tell them apart."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device, container limits included.

    Of a host's memory that is this process's share, if ``torchrun`` started several there.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with suppress(OSError, ValueError):  # no control group, or "max"
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0) // local_world_size()


def used_bytes(device: torch.device) -> int:
    """Memory in use by this process where the work is done."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else anonymous_rss()


def limit_gpu_memory(gpu: torch.device, budget: int) -> None:
    """Let this process have no more than ``budget`` bytes of a GPU's memory."""
    total = torch.cuda.get_device_properties(gpu).total_memory
    # Given by its number: a device without one (`cuda`) is refused here, though it is not elsewhere.
    torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), gpu.index)


@cache
def _libc() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    libc = ctypes.CDLL(name) if name else None
    return libc if libc is not None and hasattr(libc, "malloc_trim") else None


def malloc_trim() -> None:
    """Give freed memory back to the system: glibc keeps it, scattered among what is in use."""
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


def return_large_blocks() -> None:
    """Let blocks of a megabyte and more go back to the system as soon as they are freed: glibc keeps those of up to
    32 MB once it has seen such, scattered where layers are gathered and freed in turn."""
    if (libc := _libc()) is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)


@dataclass(frozen=True)
class MemoryRequirement:
    """Memory that a run needs on its device, in bytes.

    Args:
        layer: the weights of the largest layer, dense and narrow, and its batch while it runs.
        solver: the matrices of the largest problem.
        stream: the hidden states between two layers.
        kept: the inputs of the widest output matrix over all tokens.
        streams: how many things of the stream's size are kept while a layer is worked on: the hidden states and what
            attention returned; with experts also what they read and what they return, and their dense output.
        arguments: what the layers read beside them that differs by batch.
    """

    layer: int
    solver: int
    stream: int
    kept: int
    streams: int = 2
    arguments: int = 0

    @property
    def between_layers(self) -> int:
        """All that is kept while a layer is worked on, apart from the inputs of its output matrices."""
        return self.streams * self.stream + self.arguments


@dataclass(frozen=True)
class Placement:
    """Memory that each kind of activation is kept in, and whether the Gram matrix is memory-mapped.

    Args:
        budget: bytes of memory that may be used on the device.
        stream: ``device``, ``host`` or ``file``.
        kept: ``device``, ``host`` or ``recompute``.
        gram: ``device`` or ``file``.
    """

    budget: int
    stream: str
    kept: str
    gram: str = DEVICE

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def memory_limit(device: torch.device, budget: int | None, used: int) -> int:
    """Bytes that may be in use on a device: the budget, or those in use and most of what is free."""
    return budget if budget is not None else used + int(USABLE_FRACTION * free_bytes(device))


def choose_placement(need: MemoryRequirement, device: torch.device, budget: int | None = None) -> Placement:
    """The fastest places that the budget allows.

    What is needed at once comes first (a layer, the solver), then the stream, of which there are two or more while
    a layer is worked on, then the inputs of the output matrix, which can also be computed twice.

    Args:
        budget: bytes; on a GPU of its memory, on the CPU of the process's anonymous memory. ``None``: what is free.

    Raises:
        UsageError: a layer and its solver alone are more than the budget.
    """
    base = used_bytes(device)
    limit = memory_limit(device, budget, base)
    room = limit - base - max(need.layer, need.solver)
    on_cpu = device.type == "cpu"
    gram = DEVICE
    if room < 0 and on_cpu:  # half of the solver's memory is the Gram matrix
        gram = FILE
        room = limit - base - max(need.layer, need.solver * 2 // 3)
    if room < 0:
        least = limit - room
        raise UsageError(
            f"a memory budget of {limit / 1e9:.2f} GB is too small: one layer and its solver need "
            f"{least / 1e9:.2f} GB; raise --memory, or lower --batch-size"
        )
    stream = kept = DEVICE
    if need.between_layers > room:
        stream = FILE if on_cpu else HOST
    else:
        room -= need.between_layers
    host = free_bytes(torch.device("cpu")) * USABLE_FRACTION if not on_cpu else 0.0
    if stream == HOST:
        if need.between_layers > host:
            stream = FILE
        else:
            host -= need.between_layers
    if need.kept > room:
        kept = HOST if need.kept < host else RECOMPUTE
    return Placement(limit, stream, kept, gram)
