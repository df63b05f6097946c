"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from slimgpt.errors import OutputError


def publish(draft: Path, file: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    with draft.open("rb") as handle:
        os.fsync(handle.fileno())
    draft.replace(file)


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file; one that is there stays until the new one is whole.

    Raises:
        OSError: the disk is full, or the folder may not be written to.
    """
    draft = file.with_name(file.name + ".tmp")
    try:
        draft.write_bytes(content)
        publish(draft, file)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """:func:`write_bytes` of a text, as UTF-8."""
    write_bytes(file, text.encode())


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file that somebody asked for; see :func:`write_bytes`. A device, such as ``/dev/stdout``, is written to.

    Args:
        content: bytes, or text that is written as UTF-8.

    Raises:
        OutputError: the disk is full, or the folder may not be written to.
    """
    data = content.encode() if isinstance(content, str) else content
    device = file.exists() and not file.is_file()  # which nothing can replace
    try:
        (Path.write_bytes if device else write_bytes)(file, data)
    except OSError as error:
        raise OutputError(f"writing {file} failed: {error}; free some space, or give another file") from error
