"""A folder that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slimgpt.errors import OutputError


def check_output(
    folder: str | Path,
    overwrite: bool = False,
    needed: int = 0,
    marker: str = "config.json",
    made_from: Iterable[Path] = (),
) -> Path:
    """Refuse an output folder early: before the work that would fill it.

    Args:
        overwrite: a folder of the same kind that is there may be replaced.
        needed: bytes that will be written.
        marker: the file that tells such a folder from others; ``config.json`` is in every model's.
        made_from: the folders of the model that the new one is made from, which are never replaced.

    Raises:
        OutputError: the folder exists, is no folder, cannot be written to, or its disk is too full.
    """
    path = Path(folder).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} exists and is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()):
        if any(source.resolve().is_relative_to(path.resolve()) for source in made_from):
            raise OutputError(f"{path} holds the model that is read; give another folder for the result")
        if not overwrite:
            raise OutputError(f"{path} exists; give another folder, or pass --overwrite to replace it")
        if not (path / marker).is_file():
            kind = "model" if marker == "config.json" else marker
            raise OutputError(f"{path} exists and holds no {kind}; --overwrite replaces only folders that do")
    ancestor = path.parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise OutputError(f"cannot write below {ancestor}; give a folder you may write to")
    free = shutil.disk_usage(ancestor).free
    if needed > free:
        raise OutputError(
            f"the disk of {ancestor} has {free / 1e9:.2f} GB free, the output needs about {needed / 1e9:.2f} GB"
        )
    return path


@contextmanager
def new_folder(folder: str | Path, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name once the block has ended well.

    On any error, Ctrl-C included, it is removed and what was at ``folder`` before is still there.

    Raises:
        OutputError: as :func:`check_output`, or the disk ran full.
    """
    path = check_output(folder, overwrite, marker=marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        work.mkdir()
        yield work
        settle(work)
        if path.exists():
            old = path.parent / f".{path.name}.replaced-{uuid.uuid4().hex[:8]}"
            path.rename(old)
            work.rename(path)
            shutil.rmtree(old)
        else:
            work.rename(path)
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or isinstance(error, SafetensorError):
            raise OutputError(f"writing {path} failed, nothing was left there: {error}") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def settle(folder: Path) -> None:
    """Make the files of a folder readable to others and put their bytes on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
