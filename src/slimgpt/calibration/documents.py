"""Documents from wherever the user has text: files, folders, the hub, the demo."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimgpt import assets
from slimgpt.errors import CalibrationError, first_line


@dataclass(frozen=True)
class Instruction:
    """A task as Alpaca writes it: everything before the answer, and the answer."""

    prompt: str
    response: str


Document = str | list[dict[str, Any]] | Instruction
"""Plain text, chat messages (``role`` and ``content``), or an instruction with its answer."""

SUFFIXES = (".txt", ".jsonl", ".parquet")
SEGMENT = 1 << 16
"""Characters after which a plain text file is cut at the next line end, so that a long file can be shuffled."""


def read_documents(source: str) -> Iterator[Document]:
    """The documents of a source, in its own order.

    Args:
        source: a ``.txt``, ``.jsonl`` or ``.parquet`` file (fields ``text``, ``messages``, or ``instruction`` and
            ``output``), a folder of these, a ``.json`` file with a list of such rows, ``demo``, or a ``datasets`` id,
            optionally as ``id:config`` or ``id:config:split``.

    Raises:
        CalibrationError: nothing is there, or a file cannot be read.
    """
    if source == assets.DEMO:
        yield from assets.demo_documents()[0]
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise CalibrationError(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from _read_file(file)
    elif path.is_file():
        yield from _read_file(path)
    elif path.suffix in (*SUFFIXES, ".json") or path.is_absolute() or source.startswith((".", "~")):
        raise CalibrationError(f"no such text: {path}")
    else:
        yield from _read_hub(source)


def local_files(sources: Iterable[object]) -> list[Path]:
    """Those of some sources that are files or folders of this machine."""
    paths = (Path(source).expanduser() for source in sources if isinstance(source, str) and source != assets.DEMO)
    return [path for path in paths if path.exists()]


def _read_file(path: Path) -> Iterator[Document]:
    try:
        if path.suffix == ".txt":
            yield from _segments(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        where = f"{path}, line {number}"
                        yield _document(_parsed(line, where), where)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise CalibrationError(f"{path} holds no list of rows; give JSON lines as .jsonl")
            for number, row in enumerate(rows, 1):
                yield _document(row, f"{path}, row {number}")
        elif path.suffix == ".parquet":
            import pyarrow.parquet as pq  # heavy, and seldom needed

            for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
                for number, row in enumerate(batch.to_pylist(), 1):
                    yield _document(row, f"{path}, row {number}")
        else:
            raise CalibrationError(f"{path} is none of {', '.join(SUFFIXES)}, .json")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        raise CalibrationError(f"cannot read {path}: {error}") from error


def _parsed(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is no JSON: {error.msg} at character {error.pos + 1}") from error


def _segments(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + SEGMENT) + 1 or len(text)
        yield text[start:end]
        start = end


def _document(row: object, where: str) -> Document:
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return row["messages"]
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
            return Instruction(alpaca_prompt(row["instruction"], row.get("input") or ""), row["output"])
    fields = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(f"{where} has no `text`, no `messages`, and no `instruction` with `output`; it has {fields}")


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """A task in the form that Alpaca (Taori et al., 2023) made common, up to where the answer begins."""
    given = ", paired with an input that provides further context" if context else ""
    parts = [
        f"Below is an instruction that describes a task{given}. Write a response that appropriately completes the "
        "request.",
        f"### Instruction:\n{instruction}",
        *([f"### Input:\n{context}"] if context else []),
        "### Response:\n",
    ]
    return "\n\n".join(parts)


def _read_hub(source: str) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"'{source}' is no file or folder here; to read it from the hub: pip install 'slimgpt[hub]'"
        ) from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield _document(row, f"dataset {source}")
    except CalibrationError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise CalibrationError(f"'{source}' is no file or folder here, and not on the hub: {reason}") from error


def shuffled(documents: Iterator[Document], seed: int, reservoir: int = 10_000) -> list[Document]:
    """At most ``reservoir`` of the first documents, in an order given by the seed."""
    chosen = [document for document, _ in zip(documents, range(reservoir))]
    random.Random(seed).shuffle(chosen)
    return chosen
