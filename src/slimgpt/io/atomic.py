"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file that appears whole or not at all."""
    write_bytes(file, text.encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; on an error what was there stays, and no draft of it."""
    draft = file.with_name(file.name + ".tmp")
    try:
        draft.write_bytes(content)
        publish(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def publish(draft: Path, file: Path) -> None:
    """Give a file its name once its bytes are on the disk."""
    with draft.open("rb") as handle:
        os.fsync(handle.fileno())
    draft.replace(file)
