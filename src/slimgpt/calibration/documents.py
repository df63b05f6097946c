"""Documents from wherever the user has text: files, folders, the hub, the demo."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from slimgpt import assets
from slimgpt.errors import CalibrationError, one_line
from slimgpt.io.arrow import check_pyarrow
from slimgpt.runtime.thresholds import thresholds


@dataclass(frozen=True)
class Instruction:
    """A task as Alpaca writes it: everything before the answer, and the answer."""

    prompt: str
    response: str


class Conversation(list[dict[str, Any]]):
    """Chat messages (``role`` and ``content``), and the file and row they were read from."""

    def __init__(self, messages: Iterable[dict[str, Any]], where: str):
        super().__init__(messages)
        self.where = where


Document = str | list[dict[str, Any]] | Instruction
"""Plain text, chat messages (``role`` and ``content``), or an instruction with its answer."""

AUTO = "auto"
"""The name that stands for text that the model writes itself."""

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")
ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of who speaks, and a chat template's; others stay as they are."""

IN_MEMORY = ("tensor", "rows")
"""What a report calls calibration that is no file, folder or data set but a tensor or rows in memory."""


def read_documents(source: str) -> Iterator[Document]:
    """The documents of a source, in its own order.

    Args:
        source: a ``.txt``, ``.jsonl``, ``.ndjson`` or ``.parquet`` file (fields ``text``, ``messages``,
            ``instruction`` and ``output``, or ``conversations``), all but the last also as ``.gz`` or ``.zst``; a
            folder of these, without its hidden files; a ``.json`` file with a list of such rows, ``demo``, or a
            ``datasets`` id, optionally as ``id:config`` or ``id:config:split``. Rows that are null are left out.

    Raises:
        CalibrationError: nothing is there, or a file cannot be read.
    """
    if source == assets.DEMO:
        yield from assets.demo_documents()[0]
        return
    path = Path(source).expanduser()
    if os.path.isdir(path):
        files = sorted(file for file in path.rglob("*") if _belongs(file, path))
        if not files:
            raise CalibrationError(f"{path} holds no {', '.join(SUFFIXES)} file")
        for file in files:
            yield from read_file(file)
    elif os.path.lexists(path):
        yield from read_file(path)
    elif text_format(path) or path.is_absolute() or source.startswith((".", "~")):
        raise CalibrationError(f"no such text: {path}")
    else:
        yield from _read_hub(source)


def read_rows(rows: Iterable[object]) -> Iterator[Document]:
    """The documents of texts and rows in memory: strings, or dicts as a line of a ``.jsonl`` file holds one.

    Raises:
        CalibrationError: a row that is neither.
    """
    for number, row in enumerate(rows):
        document = row if isinstance(row, str) else _document(row, f"row {number} of calibration")
        if document is not None:
            yield document


def hub_dataset(source: str) -> str | None:
    """The id on the hub of a source that :func:`read_documents` reads from there; ``None`` for any other."""
    path = Path(source).expanduser()
    local = os.path.lexists(path) or text_format(path) or path.is_absolute() or source.startswith((".", "~"))
    return None if source in (assets.DEMO, AUTO, *IN_MEMORY) or local else source.partition(":")[0]


def text_format(path: Path) -> str | None:
    """The ending that says how a file is read (``.txt``, ``.jsonl``, ``.json`` or ``.parquet``), whatever its case and
    compression; ``None`` for any other."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = bool(endings) and endings[-1] in COMPRESSED
    ending = endings[-1 - packed] if len(endings) > packed else ""
    if packed and ending == ".parquet":
        return None
    return ".jsonl" if ending == ".ndjson" else ending if ending in (*SUFFIXES, ".json") else None


def _belongs(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and not file.is_dir() and text_format(file) not in (None, ".json")


def check_regular(path: Path) -> None:
    """Refuse what is no file with an end, before anything is read of it.

    Raises:
        CalibrationError: a pipe, a device, a socket, a folder, or a link that leads nowhere.
    """
    if os.path.lexists(path) and not path.is_file():
        problem = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "no regular file"
        raise CalibrationError(f"{path} is {problem}; text is read from regular files only: copy it into one")


def local_files(sources: Iterable[object]) -> list[Path]:
    """Those of some sources that are files or folders of this machine."""
    paths = (Path(source).expanduser() for source in sources if isinstance(source, str) and source != assets.DEMO)
    return [path for path in paths if os.path.exists(path)]


def open_text(path: Path) -> IO[str]:
    """A text file, unpacked where its name ends in ``.gz`` or ``.zst``, without a byte order mark.

    Raises:
        CalibrationError: it is no regular file, or the module that unpacks it is not installed.
    """
    check_regular(path)
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(IO[str], gzip.open(path, "rt", encoding="utf-8-sig"))
    if ending == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError:
            raise CalibrationError(
                f"{path} is packed with zstd: pip install zstandard, or give it unpacked or as .gz"
            ) from None
        return zstandard.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def read_file(path: Path) -> Iterator[Document]:
    """The documents of one file.

    Raises:
        CalibrationError: it cannot be read, or a row holds no text; with the number of the row.
    """
    kind = text_format(path)
    try:
        check_regular(path)
        if kind == ".txt":
            with open_text(path) as file:
                yield from _segments(file, path)
        elif kind is None:
            raise CalibrationError(f"{path} is none of {', '.join(SUFFIXES)}, .json")
        else:
            rows = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet_rows}[kind](path)
            for row, where in rows:
                document = _document(row, where)
                if document is not None:
                    yield document
    except CalibrationError:
        raise
    except Exception as error:  # what a damaged file makes of gzip, zstd, JSON and Parquet has no common class
        raise CalibrationError(f"cannot read {path}: {one_line(error)}") from error


def _json_lines(path: Path) -> Iterator[tuple[object, str]]:
    with open_text(path) as file:
        number = 0
        while line := file.readline(thresholds().longest_line + 1):
            number += 1
            where = f"{path}, line {number}"
            _check_length(line, where)
            if line.strip():
                yield _parsed(line, where), where


def _json_list(path: Path) -> Iterator[tuple[object, str]]:
    longest = thresholds().longest_list
    with open_text(path) as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise CalibrationError(
            f"{path} has more than {longest:,} characters, and a list is read as a whole; give JSON lines as .jsonl"
        )
    rows = _parsed(content, str(path))
    if not isinstance(rows, list):
        raise CalibrationError(f"{path} holds no list of rows; give JSON lines as .jsonl")
    for number, row in enumerate(rows, 1):
        yield row, f"{path}, row {number}"


def _parquet_rows(path: Path) -> Iterator[tuple[object, str]]:
    check_pyarrow(path)
    import pyarrow.parquet as pq  # heavy, and seldom needed

    number = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield row, f"{path}, row {number}"


def _check_length(line: str, where: str) -> None:
    longest = thresholds().longest_line
    if len(line) > longest:
        raise CalibrationError(
            f"{where} has more than {longest:,} characters; cut it into several, with a line end after each"
        )


def _parsed(text: str, where: str) -> object:
    try:
        row = json.loads(text)
        if "\\u" in text:  # half a pair of surrogates can be written so, and no tokenizer takes it
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where} is no JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} cannot be read as JSON: {one_line(error)}") from error
    return row


def _segments(file: IO[str], path: Path) -> Iterator[str]:
    while start := file.read(thresholds().segment):
        rest = file.readline(thresholds().longest_line + 1)
        _check_length(rest, f"a line of {path}")
        yield start + rest


FIELDS = ("messages", "text", "instruction", "output", "conversations")


def _document(row: object, where: str) -> Document | None:
    """A row as a document; ``None`` for one that is null."""
    if row is None:
        return None
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return _conversation(row["messages"], where)
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
            return Instruction(alpaca_prompt(row["instruction"], row.get("input") or ""), row["output"])
        if isinstance(row.get("conversations"), list):
            return _conversation(row["conversations"], where)
        named = [field for field in FIELDS if field in row]
        if named and all(row[field] is None for field in named):
            return None
    fields = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(
        f"{where} has no `text`, no `messages`, no `conversations`, and no `instruction` with `output`; it has {fields}"
    )


def _conversation(turns: list[Any], where: str) -> Conversation:
    if not turns:
        raise CalibrationError(f"{where} has a conversation without a message; take the row out")
    return Conversation([_message(turn, f"{where}, message {number}") for number, turn in enumerate(turns, 1)], where)


def _message(turn: object, where: str) -> dict[str, Any]:
    """A message with ``role`` and ``content``, from what chat data has in their place."""
    if not isinstance(turn, dict):
        raise CalibrationError(f"{where} is {type(turn).__name__}; it must have `role` and `content`")
    message = {name: value for name, value in turn.items() if name not in ("from", "value")}
    role = turn["role"] if turn.get("role") is not None else turn.get("from")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if not isinstance(role, str):
        raise CalibrationError(f"{where} has no `role` and no `from` that names who speaks; it has {sorted(turn)}")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise CalibrationError(
            f"{where} has no text in `content` or `value` (it has {sorted(turn)}); give it one, or take the row out"
        )
    return {**message, "role": ROLES.get(role, role), "content": content}


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise CalibrationError(f"{where} has a part of type '{kind}'; only parts of text are read: take the row out")


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """A task in the form that Alpaca (Taori et al., 2023) made common, up to where the answer begins."""
    addition = ", paired with an input that provides further context" if context else ""
    parts = [
        f"Below is an instruction that describes a task{addition}. Write a response that appropriately completes the "
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
        for number, row in enumerate(rows, 1):
            document = _document(row, f"dataset {source}, row {number}")
            if document is not None:
                yield document
    except CalibrationError:
        raise
    except Exception as error:
        reason = one_line(error)
        raise CalibrationError(f"'{source}' is no file or folder here, and not on the hub: {reason}") from error


def shuffled(documents: Iterator[Document], seed: int, shuffle_buffer: int = 10_000) -> list[Document]:
    """At most ``shuffle_buffer`` of the first documents, in an order given by the seed."""
    chosen = [document for document, _ in zip(documents, range(shuffle_buffer))]
    random.Random(seed).shuffle(chosen)
    return chosen
