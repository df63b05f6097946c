"""Working folders of runs that can be resumed: ``.OUT.unfinished`` beside the output, with the run's request in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from slimgpt.errors import OutputError, ResumeError
from slimgpt.io.atomic import write_text

JOURNAL_FILE, DISCARDED_FILE = "journal.json", "discarded.json"


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


def open_unfinished(
    folder: Path, request: dict[str, Any], resume: bool, overwrite: bool, discard: Callable[[], None]
) -> None:
    """Begin an unfinished run in its folder, or go on with it.

    Args:
        request: what decides the result, as it is read back from JSON.
        resume: go on with an unfinished run if there is one.
        overwrite: start anew in place of an unfinished run.
        discard: removes the folder.

    Raises:
        ResumeError: an unfinished run of another request, or one that was not asked for.
        OutputError: the disk is full.
    """
    file = folder / JOURNAL_FILE
    if folder.exists() and not file.is_file():
        _check_ours(folder)  # killed before it had begun, or while it was cleared away
        discard()
    if folder.exists() and not resume:
        if not overwrite:
            raise ResumeError(
                f"an unfinished run is in {folder}; pass --resume to go on with it, or --overwrite to start anew"
            )
        discard()
    if not folder.exists():
        folder.mkdir(parents=True)
        try:
            write_text(file, json.dumps(request, indent=1))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OutputError(f"writing {file} failed, nothing was left there: {error}; free some space") from error
    with reading(file):
        before = json.loads(file.read_text(encoding="utf-8"))
    mismatches = differences(before, request)
    if mismatches:
        raise ResumeError(
            f"the unfinished run in {folder} is another one: {'; '.join(mismatches)}. Give the same options again, or "
            "--overwrite without --resume to start anew"
        )


def _check_ours(folder: Path) -> None:
    """Refuse a folder of the working folder's name that no run has made.

    Raises:
        OutputError: it is a link or a file, or something else is in it.
    """
    whole = folder.is_dir() and not folder.is_symlink()
    entries = [entry for entry in folder.iterdir() if entry.name != f"{JOURNAL_FILE}.tmp"] if whole else []
    if not whole or (entries and not (folder / DISCARDED_FILE).is_file()):
        others = f" ({entries[0].name}, ...)" if whole else ""
        raise OutputError(
            f"{folder} is where this run would keep its layers, and no run of ours has made it{others}; move it away, "
            "or give another folder for the result"
        )


def delete_unfinished(folder: Path) -> None:
    """Remove a working folder; what tells that it is ours goes last, so that a kill in between is understood."""
    journal, discarded = folder / JOURNAL_FILE, folder / DISCARDED_FILE
    if journal.is_file():
        journal.replace(discarded)
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry != discarded:
            entry.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def unfinished_folder(output: Path) -> Path:
    """Working folder of a run that will write ``output``."""
    return output.parent / f".{output.name}.unfinished"


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Differences of two requests, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [text for key in keys for text in differences(before.get(key), now.get(key), f"{where}{key} ".lstrip())]
    if before == now:
        return []
    if isinstance(before, (list, dict)) or isinstance(now, (list, dict)) or len(str(before)) + len(str(now)) > 100:
        return [f"{where.strip()} differs"]
    return [f"{where.strip()} was {before}, now {now}"]
