"""Several processes, each with a share of the calibration windows; rank 0 decides, writes and prints."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from slimgpt.errors import RankError, UsageError
from slimgpt.solver import Gram

MESSAGE_BYTES = 1 << 26
"""Largest message of rows that are gathered."""

TIMEOUT = timedelta(hours=6)
"""After which a process no longer waits for another; the first may solve for long."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that ``torchrun`` started; one alone needs nothing of it.

    Args:
        rank: number of this process.
        world: number of processes that share the work.
        group: the process group; ``None``: all processes.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def main(self) -> bool:
        """Whether this process decides, writes and prints."""
        return self.rank == 0

    @property
    def member(self) -> bool:
        """Whether this process takes part; see :meth:`first`."""
        return self.rank < self.world

    def first(self, count: int) -> Ranks:
        """The first processes, ``count`` at most; every process has to call this, those left out do not take part."""
        if count >= self.world:
            return self
        if count == 1:
            return Ranks(self.rank, 1)
        with collective_errors():
            return Ranks(self.rank, count, dist.new_group(list(range(count)), timeout=TIMEOUT))

    def rows(self, count: int) -> slice:
        """This process's share of ``count`` rows, as ``Tensor.tensor_split`` divides them; none if there are few."""
        size, more = divmod(count, self.world)
        start = self.rank * size + min(self.rank, more)
        return slice(start, start + size + (self.rank < more))

    def share(self, windows: Tensor) -> Tensor:
        """This process's windows.

        Raises:
            UsageError: fewer windows than processes.
        """
        if len(windows) < self.world:
            raise UsageError(f"{len(windows)} windows cannot be divided among {self.world} processes; start fewer")
        return windows[self.rows(len(windows))]

    def reduce(self, gram: Gram, to: int = 0) -> None:
        """Add the partial sums of all processes up in one process's ``gram``."""
        if self.world == 1:
            return
        count = torch.tensor([gram.count], device=gram.sum.device)
        with collective_errors():
            dist.reduce(gram.sum, to, group=self.group)
            dist.reduce(count, to, group=self.group)
        if self.rank == to:
            gram.count = int(count)

    def total(self, tensor: Tensor) -> None:
        """Add all processes' ``tensor`` up in each of them."""
        if self.world > 1:
            with collective_errors():
                dist.all_reduce(tensor, group=self.group)

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums over processes of some numbers, to the same bit in each of them."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        self.total(tensor)
        return tensor.tolist()

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """One process's ``tensor`` in all; the others give one of the same shape and type to be filled."""
        if self.world > 1:
            tensor = tensor.contiguous()
            with collective_errors():
                dist.broadcast(tensor, source, group=self.group)
        return tensor

    def agree(self, number: int) -> int:
        """Rank 0's number in all processes."""
        if self.world == 1:
            return number
        return int(self.broadcast(torch.tensor([number], device=self._device)))

    def gather_rows(self, tensor: Tensor) -> None:
        """Fill rank 0's ``tensor`` up with the rows that the others own, who give a tensor of these alone."""
        if self.world == 1:
            return
        block = max(MESSAGE_BYTES // max(tensor[:1].nbytes, 1), 1)
        with collective_errors():
            if not self.main:
                for rows in tensor.split(block):
                    dist.send(rows.contiguous().to(self._device), 0, group=self.group)
                return
            for rank in range(1, self.world):
                for rows in tensor[Ranks(rank, self.world).rows(len(tensor))].split(block):
                    received = torch.empty_like(rows, device=self._device)
                    dist.recv(received, rank, group=self.group)
                    rows.copy_(received)

    def values(self, values: Any) -> Any:
        """Rank 0's values, which JSON can hold, in all processes."""
        return values if self.world == 1 else json.loads(self.texts(json.dumps(values) if self.main else "")[0])

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, by rank, in each of them."""
        if self.world == 1:
            return [text]
        own = torch.frombuffer(bytearray(f"{text}\n".encode()), dtype=torch.uint8).to(self._device)  # none is empty
        sizes = torch.zeros(self.world, dtype=torch.long, device=self._device)
        sizes[self.rank] = len(own)
        self.total(sizes)
        padded = [own.new_zeros(int(sizes.max())) for _ in range(self.world)]
        padded[self.rank][: len(own)] = own
        with collective_errors():
            dist.all_gather(padded, padded[self.rank].clone(), group=self.group)
        return [row[:size].cpu().numpy().tobytes().decode()[:-1] for row, size in zip(padded, sizes.tolist())]

    def see(self, folder: Path) -> bool:
        """Whether all processes see rank 0's folder, as those of one machine do."""
        if self.world == 1:
            return True
        file = folder / "seen"
        number = self.agree(secrets.randbits(62))
        if self.main:
            file.write_text(str(number), encoding="utf-8")
        self.agree(0)  # it is there now
        with suppress(OSError, ValueError):
            number -= int(file.read_text(encoding="utf-8"))
        seen = self.sums([float(number == 0)]) == [self.world]
        if self.main:
            file.unlink()
        return seen

    @property
    def _device(self) -> str:
        """The device of small tensors."""
        return "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"


ALONE = Ranks()
"""A process that ``torchrun`` did not start, or that works by itself."""


@contextmanager
def collective_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistBackendError and Gloo's closed connections are RuntimeErrors
        raise RankError(
            "another process of this run has ended, so this one cannot go on; its message is above. Start the same "
            "command with --resume; the number of processes may differ"
        ) from error


def in_torchrun() -> bool:
    """Whether ``torchrun`` (or another launcher that sets its variables) started this process."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank_of_environment() -> int:
    """This process's number; 0 where there is only one."""
    return int(os.environ["RANK"]) if in_torchrun() else 0


def local_world_size() -> int:
    """Number of processes that ``torchrun`` started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def join(device: torch.device) -> Iterator[Ranks]:
    """Take part in the run that ``torchrun`` started: NCCL on GPUs, Gloo on CPUs; alone without it."""
    if not in_torchrun():
        yield Ranks()
        return
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    try:
        yield Ranks(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process where several share a machine and the user named none."""
    if device.type == "cuda" and device.index is None and in_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device
