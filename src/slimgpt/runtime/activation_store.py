"""Activations kept between two passes: on the device, in host memory or in a file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from slimgpt.errors import OutputError
from slimgpt.runtime.memory import DEVICE, FILE


class ActivationStore:
    """Tensors by number, such as one per batch, kept in a chosen place.

    Args:
        place: ``device``, ``host`` (pinned where a GPU is used) or ``file``.
        device: where :meth:`get` returns them.
        scratch: the folder for the files.
    """

    def __init__(self, place: str, device: torch.device, scratch: Path | None = None):
        self.place, self.device, self.scratch = place, device, scratch
        self._tensors: dict[int, Tensor] = {}
        self._folder = tempfile.TemporaryDirectory(dir=scratch) if place == FILE else None

    def empty_like(self) -> ActivationStore:
        """Another store in the same place."""
        return ActivationStore(self.place, self.device, self.scratch)

    def put(self, number: int, tensor: Tensor) -> None:
        """Keep a tensor; one of the same number and shape is replaced where it is."""
        if self.place == DEVICE:
            self._tensors[number] = tensor.to(self.device)
            return
        kept = self._tensors.get(number)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = self.make(number, tensor.shape, tensor.dtype)
        kept.copy_(tensor)

    def update(self, number: int, tensor: Tensor) -> None:
        """Replace the numbers of a tensor, rounded to the type that it is kept in, where it is."""
        self._tensors[number].copy_(tensor)

    def __contains__(self, number: int) -> bool:
        return number in self._tensors

    def make(self, number: int, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for a tensor that is to be filled in, where it will be kept."""
        if self._folder is not None:
            made = mapped(Path(self._folder.name) / str(number), shape, dtype)
        elif self.place == DEVICE:
            made = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            made = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        self._tensors[number] = made
        return made

    def get(self, number: int) -> Tensor:
        """The tensor, on the device."""
        return self._tensors[number].to(self.device, non_blocking=True)

    def take(self, number: int) -> Tensor:
        """The tensor, no longer kept."""
        tensor = self.get(number)
        del self._tensors[number]
        return tensor

    def rows(self, number: int, index: Tensor) -> Tensor:
        """Some rows of a tensor, on the device."""
        kept = self._tensors[number]
        return kept[index.to(kept.device)].to(self.device, non_blocking=True)

    def add_rows(self, number: int, index: Tensor, values: Tensor) -> None:
        """Add to some rows of a tensor, each of them named once."""
        kept = self._tensors[number]
        kept.index_add_(0, index.to(kept.device), values.to(kept))

    def stored(self) -> dict[int, Tensor]:
        """All tensors by number, where they are kept."""
        return dict(self._tensors)

    def length(self, number: int) -> int:
        """Number of rows of a tensor."""
        return len(self._tensors[number])


def mapped(file: Path, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose memory is a file; the system writes it out where memory is short.

    Raises:
        OutputError: the disk has no room for it.
    """
    size = torch.Size(shape).numel()
    file.unlink(missing_ok=True)
    reserve(file, size * dtype.itemsize)
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)


def reserve(file: Path, size: int) -> None:
    """Take room on the disk for a file: made of zeros, or left as it is as far as it goes.

    A file that is mapped before it has room ends the process with a signal where the disk runs full.

    Raises:
        OutputError: the disk has less room, or files may not be so large.
    """
    try:
        with file.open("ab") as handle:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(handle.fileno(), 0, size)
            else:
                handle.truncate(size)
    except OSError as error:
        file.unlink(missing_ok=True)
        raise OutputError(
            f"{file.parent} has no room for {size:,} bytes of what is kept between two passes ({error.strerror}); free "
            "some space, or raise --memory, then give the same command with --resume"
        ) from error
