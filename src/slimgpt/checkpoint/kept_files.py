"""Files of unfinished runs: each appears whole or not at all, and has a checksum, so that a run that goes on takes no
other numbers than it had."""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimgpt.errors import ResumeError
from slimgpt.io.atomic import publish, write_text
from slimgpt.io.tensors import write_tensors

CHECKSUM = "crc32"
"""Where a file holds the checksum of the rest of it; CRC-32, which notices every burst of up to 32 bits."""


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Say of an error while a kept file is read that the file is damaged.

    Raises:
        ResumeError: in place of it.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ResumeError(f"{file} is damaged ({error}); start anew with --overwrite") from error


def write_values(file: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values with their checksum."""
    written = json.loads(json.dumps(values))  # as they will be read back
    write_text(file, json.dumps({**written, CHECKSUM: _values_checksum(written)}))


def read_values(file: Path) -> dict[str, Any]:
    """Values that :func:`write_values` wrote.

    Raises:
        ResumeError: they are damaged.
    """
    with reading(file):
        values = json.loads(file.read_text(encoding="utf-8"))
        compare_checksums(values.pop(CHECKSUM), _values_checksum(values))
        return values


def write_checked_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the checksum of its tensors among its metadata."""
    draft = file.with_suffix(".tmp")
    write_tensors(tensors, draft, {CHECKSUM: str(_tensors_checksum(tensors))})
    publish(draft, file)


def read_checked_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors that :func:`write_checked_tensors` wrote.

    Raises:
        ResumeError: they are damaged.
    """
    with reading(file), safe_open(file, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        compare_checksums(int(handle.metadata()[CHECKSUM]), _tensors_checksum(tensors))
        return tensors


def file_checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    if not file.stat().st_size:  # which cannot be mapped
        return 0
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return zlib.crc32(content)


def check_file(file: Path, checksum: int) -> None:
    """Compare a file with the checksum that it had.

    Raises:
        ResumeError: it is another one.
    """
    with reading(file):
        compare_checksums(checksum, file_checksum(file))


def file_checksums(files: Iterable[Path]) -> dict[str, int]:
    """The checksums of files, by their names."""
    return {file.name: file_checksum(file) for file in files}


def compare_checksums(before: int, now: int) -> None:
    """Hold a checksum against the one that was kept; within :func:`reading`.

    Raises:
        ValueError: they differ.
    """
    if before != now:
        raise ValueError("its checksum is another than when it was written")


def _values_checksum(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _tensors_checksum(tensors: Mapping[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        head = f"{name} {tensor.dtype} {tuple(tensor.shape)} "
        content = tensor.flatten().view(torch.uint8).numpy().data
        checksum = zlib.crc32(content, zlib.crc32(head.encode(), checksum))
    return checksum
