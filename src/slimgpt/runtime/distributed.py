"""Several processes, each with a share of the calibration windows; rank 0 decides, writes and prints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

from slimgpt.errors import RankError, UsageError
from slimgpt.solver import Gram


@dataclass(frozen=True)
class Ranks:
    """This process among those that ``torchrun`` started; one alone needs nothing of it."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        """Whether this process decides, writes and prints."""
        return self.rank == 0

    def share(self, windows: Tensor) -> Tensor:
        """This process's windows.

        Raises:
            UsageError: fewer windows than processes.
        """
        if len(windows) < self.world:
            raise UsageError(f"{len(windows)} windows cannot be divided among {self.world} processes; start fewer")
        return windows.tensor_split(self.world)[self.rank]

    def reduce(self, gram: Gram) -> None:
        """Add the partial sums of all processes up in rank 0's ``gram``."""
        if self.world == 1:
            return
        count = torch.tensor([gram.count], device=gram.sum.device)
        with collective_errors():
            dist.reduce(gram.sum, 0)
            dist.reduce(count, 0)
        if self.main:
            gram.count = int(count)

    def total(self, tensor: Tensor) -> None:
        """Add all processes' ``tensor`` up in each of them."""
        if self.world > 1:
            with collective_errors():
                dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's ``tensor`` in all processes; the others give one of the same shape and type to be filled."""
        if self.world > 1:
            tensor = tensor.contiguous()
            with collective_errors():
                dist.broadcast(tensor, 0)
        return tensor

    def agree(self, number: int) -> int:
        """Rank 0's number in all processes."""
        if self.world == 1:
            return number
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return int(self.broadcast(torch.tensor([number], device=device)))


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

    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=6))  # rank 0 may solve for long
    try:
        yield Ranks(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process where several share a machine and the user named none."""
    if device.type == "cuda" and device.index is None and in_torchrun():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device
