"""An output folder that appears whole or not at all, and what may be replaced by it."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from slimgpt.errors import DISK_FULL, OutputError

WORKING_NAME = ".{}.unfinished"
"""The longest name that is made from the output's."""

MAX_FILES_NAMED = 3


class FolderKind(NamedTuple):
    """A kind of folder that ``--overwrite`` may replace.

    Args:
        name: as messages have it.
        marker: the file that every such folder has.
        patterns: names of files, relative to the folder, that belong to it. Others are somebody's and are never
            deleted.
    """

    name: str
    marker: str
    patterns: Sequence[str]


MODEL_FOLDER = FolderKind(
    "model",
    "config.json",
    (
        *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.gguf"),
        *("pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated*", "params.json", "original/*"),
        *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken"),
        *("spiece.model", "sentencepiece*.model", "chat_template.*", "additional_chat_templates/*.jinja"),
        *("*processor_config.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json"),
        *("modeling_*.py", "configuration_*.py", "tokenization_*.py", "custom_generate/*", "__pycache__/*.pyc"),
        *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md", ".gitattributes", ".cache/huggingface/*"),
        *(
            "slimgpt.json",
            "speed-table.json",
            "widths.png",
            "recovery.json",
            "recovery.png",
            "*.onnx",
            "*.onnx?data",
            "openvino_*",
        ),
    ),
)
COMPARISON_FOLDER = FolderKind("comparison", "compare.json", ("compare.json", "quality.png", "quality.svg", "*.html"))


def check_output(
    folder: str | Path,
    overwrite: bool = False,
    needed: int = 0,
    kind: FolderKind = MODEL_FOLDER,
    inputs: Iterable[Path] = (),
) -> Path:
    """Refuse an output folder early: before the work that would fill it.

    Args:
        overwrite: a folder of the same kind that is there may be replaced, if nothing else is in it.
        needed: bytes that will be written.
        inputs: files and folders that the run reads, which are never replaced.

    Raises:
        OutputError: the folder exists, is a link or a mount point, is being written by another process, cannot be
            written to, or its disk is too full.
    """
    path = Path(folder).expanduser().absolute()
    ancestor = _existing_ancestor(path)
    if path.is_symlink():
        raise OutputError(f"{path} is a symbolic link; give the folder itself, or another name")
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} exists and is a file; give the name of a folder")
    if path.is_dir():
        _check_replaceable(path, overwrite, kind, inputs)
    check_writable(ancestor)
    if _lock_file(path).exists():
        with output_lock(path):
            pass
    free = shutil.disk_usage(ancestor).free
    if needed > free:
        raise OutputError(
            f"the disk of {ancestor} has {free / 1e9:.2f} GB free, the output needs about {needed / 1e9:.2f} GB"
        )
    return path


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written into; a file that leaves no trace is tried.

    Raises:
        OutputError: with what the system says.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write below {folder} ({error.strerror}); give a folder you may write to") from error


def _existing_ancestor(path: Path) -> Path:
    """The nearest folder above ``path`` that exists; every name below it is checked.

    Raises:
        OutputError: a name is too long for the file system, or a part of the path is a file.
    """
    ancestor = Path(path.anchor)
    for part in path.parent.parts[1:]:
        if len(os.fsencode(part)) > 255 or not (ancestor / part).exists():
            break
        ancestor /= part
    if not ancestor.is_dir():
        raise OutputError(f"{ancestor} is a file, and a folder is to be written below it; give another name")
    check_name(path, ancestor)
    return ancestor


def check_name(path: Path, ancestor: Path | None = None) -> None:
    """Refuse names that a file system does not take.

    Args:
        ancestor: the folder above that exists; the file's own if not given.

    Raises:
        OutputError: one is too long, with what is added to the last one while it is written.
    """
    ancestor = ancestor or path.absolute().parent
    longest = os.pathconf(ancestor, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    names = [*path.absolute().relative_to(ancestor).parts, WORKING_NAME.format(path.name)]
    if max(len(os.fsencode(name)) for name in names) > longest:
        raise OutputError(
            f"the name '{path.name[:40]}...' is too long: with what is added while the run goes on, {longest} bytes is "
            "the most that the file system takes; give a shorter one"
        )


def _check_replaceable(path: Path, overwrite: bool, kind: FolderKind, inputs: Iterable[Path]) -> None:
    if os.path.ismount(path):
        raise OutputError(f"{path} is a mount point, which cannot be replaced; give a folder below it")
    check_writable(path)
    if not any(path.iterdir()):
        return
    for source in inputs:
        if source.resolve().is_relative_to(path.resolve()):
            problem = "holds the model that is read" if source.is_dir() else f"holds {source.name}, which is read"
            raise OutputError(f"{path} {problem}; give another folder for the result")
    if not overwrite:
        raise OutputError(f"{path} exists; give another folder, or pass --overwrite to replace it")
    if not _is_of_kind(path, kind):
        raise OutputError(f"{path} exists and holds no {kind.name}; --overwrite replaces only folders that do")
    if others := foreign_files(path, kind):
        named = ", ".join(others[:MAX_FILES_NAMED]) + (", ..." if len(others) > MAX_FILES_NAMED else "")
        raise OutputError(
            f"{path} also holds {len(others)} files that do not belong to a {kind.name} ({named}); --overwrite would "
            "delete them: move them away, or give another folder"
        )


def _is_of_kind(path: Path, kind: FolderKind) -> bool:
    """Whether a folder is what ``--overwrite`` may replace; a model has a config that names its type, and weights."""
    if not (path / kind.marker).is_file():
        return False
    if kind is not MODEL_FOLDER:
        return True
    try:
        config = json.loads((path / kind.marker).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    weights = ("*.safetensors", "*.gguf", "*.bin", "*.onnx")
    return (
        isinstance(config, dict)
        and isinstance(config.get("model_type"), str)
        and any(next(path.glob(pattern), None) is not None for pattern in weights)
    )


def foreign_files(folder: Path, kind: FolderKind) -> list[str]:
    """The files in a folder that do not belong to its kind, by their names relative to it."""
    names = (Path(root, file).relative_to(folder).as_posix() for root, _, files in os.walk(folder) for file in files)
    return sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in kind.patterns))


def _lock_file(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


@contextmanager
def output_lock(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same output; may be entered again by the process that holds it.

    Raises:
        OutputError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock_file(path)
    lock = FileLock(file, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"another process is writing {path}; wait until it has ended, or give another folder"
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def new_folder(
    folder: str | Path, overwrite: bool = False, kind: FolderKind = MODEL_FOLDER, inputs: Iterable[Path] = ()
) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name once the block has ended well.

    On any error, Ctrl-C included, it is removed and what was at ``folder`` before is still there. What a killed
    process left is removed when the same output is written again.

    Raises:
        OutputError: as :func:`check_output`, or the disk ran full.
    """
    path = Path(folder).expanduser().absolute()
    with _output_errors(path), output_lock(path):
        clear_leftovers(path)
        check_output(path, overwrite, kind=kind, inputs=inputs)
        work = path.parent / f".{path.name}.partial"
        try:
            work.mkdir()
            yield work
            fsync_tree(work)
            replace_folder(work, path, path.parent / f".{path.name}.replaced")
        finally:
            shutil.rmtree(work, ignore_errors=True)


def replace_folder(work: Path, path: Path, old: Path) -> None:
    """Give a finished folder its name; what had that name is first moved to ``old``, and then deleted."""
    if path.exists():
        path.rename(old)
    try:
        work.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        if full or isinstance(error, SafetensorError):
            raise OutputError(f"writing {path} failed, nothing was left there: {error}") from error
        raise


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside an output; what was being replaced gets its name back.

    Call it while the output's lock is held.
    """
    old = path.parent / f".{path.name}.replaced"
    if old.is_dir() and not path.exists():
        old.rename(path)
    ours = re.compile(rf"\.{re.escape(path.name)}\.(partial|replaced)(-[0-9a-f]{{8}})?")
    for entry in path.parent.iterdir():
        if ours.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def fsync_tree(folder: Path) -> None:
    """Make the files of a folder readable to others and put their bytes on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes 0600, which a server under another user could not read
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
