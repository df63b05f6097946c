"""Texts to evaluate on, by name: joined as the literature joins them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from slimgpt import assets
from slimgpt.calibration.documents import (
    Conversation,
    Document,
    Instruction,
    open_text,
    read_file,
    text_format,
)
from slimgpt.errors import CalibrationError, one_line
from slimgpt.runtime.thresholds import thresholds


@dataclass(frozen=True)
class Text:
    """An evaluation text with its origin.

    Args:
        name: as the user gave it.
        content: the text itself.
        joining: how rows became one text.
        file: where it was read, if it was a file.
        max_windows: what the convention looks at; everything if ``None``.
    """

    name: str
    content: str
    joining: str = "as in the file"
    file: Path | None = None
    max_windows: int | None = None


@dataclass(frozen=True)
class Corpus:
    """A corpus that papers report on.

    Args:
        files: patterns of its file below ``--data-dir``, the first that is there counts.
        rows: the rows of such a file, as the hub has them.
        hub: arguments of ``datasets.load_dataset``.
        field: of a row.
        separator: text between two rows.
        max_rows: rows that the convention takes.
        max_windows: windows that the convention takes.
    """

    files: tuple[str, ...]
    rows: Callable[[str], Iterable[str]]
    hub: dict[str, Any]
    field: str
    separator: str
    max_rows: int | None = None
    max_windows: int | None = None


def _wiki_lines(text: str) -> Iterable[str]:
    """A line a row; the file has `` \\n`` where the hub has an empty row."""
    return (line if line.strip() else "" for line in _split(text))


def _lines(text: str) -> Iterable[str]:
    return (line.strip() for line in _split(text) if line.strip())


def _documents(text: str) -> Iterable[str]:
    return (json.loads(line)["text"] for line in _split(text) if line.strip())


def _split(text: str) -> Iterable[str]:
    """Lines with their ends. ``str.splitlines`` also cuts at form feeds and at U+2028, which stand inside rows."""
    return io.StringIO(text)


CORPORA = {
    "wikitext2": Corpus(
        files=("wikitext2/wiki.test.raw", "wiki.test.raw"),
        rows=_wiki_lines,
        hub={"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
        field="text",
        separator="\n\n",
    ),
    "ptb": Corpus(
        files=("ptb/ptb.test.txt", "ptb/test.txt"),
        rows=_lines,
        hub={
            "path": "ptb-text-only/ptb_text_only",
            "name": "penn_treebank",
            "split": "test",
            "revision": "refs/convert/parquet",
        },
        field="sentence",
        separator=" ",
    ),
    "c4": Corpus(
        files=("c4/*validation*.jsonl", "c4/*.jsonl"),
        rows=_documents,
        hub={
            "path": "allenai/c4",
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
        },
        field="text",
        separator=" ",
        max_rows=1100,
        max_windows=256,
    ),
}
"""As SparseGPT and those after it evaluate; LLM-Pruner and SlimGPT join WikiText-2 the same way."""


def read_text(name: str, data_dir: str | Path | None = None) -> Text:
    """A text by name.

    Args:
        name: a text file, taken as it is; a file of rows (``.jsonl``, ``.json``, ``.parquet``), whose texts are joined
            with an empty line; ``wikitext2``, ``ptb`` or ``c4``; or ``demo`` (the held-out speeches).
        data_dir: where the named corpora are files; from the hub if not given.

    Raises:
        CalibrationError: it cannot be read.
    """
    if name == assets.DEMO:
        return Text(name, "\n\n".join(assets.demo_documents()[1]), "held-out speeches, an empty line between two")
    path = Path(name).expanduser()
    corpus = CORPORA.get(name)
    if corpus is None or path.is_file():
        if path.is_file() and text_format(path) not in (None, ".txt"):
            return Text(name, _joined(path), "the texts of the rows, an empty line between two", path)
        return Text(name, _read(path, thresholds().longest_text), file=path)
    joining = f"rows joined with {corpus.separator!r}"
    if corpus.max_rows:
        joining = f"the first {corpus.max_rows:,} {joining}"
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        file = next((file for pattern in corpus.files for file in sorted(folder.glob(pattern))), None)
        if file is None:
            raise CalibrationError(f"{folder} has no {name}: none of {', '.join(corpus.files)} is there")
        try:
            rows = list(corpus.rows(_read(file)))[: corpus.max_rows]
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"cannot read the rows of {file}: {error}") from error
        return Text(name, corpus.separator.join(rows), f"{joining}, from {file.name}", file, corpus.max_windows)
    rows = _from_hub(name, corpus)
    return Text(name, corpus.separator.join(rows), f"{joining}, from the hub", None, corpus.max_windows)


def _joined(path: Path) -> str:
    """The texts of a file's rows, with an empty line between two; more than fits into memory is refused as in
    :func:`_read`."""
    parts, longest, length = [], thresholds().longest_text, 0
    for document in read_file(path):
        parts.append(_plain(document, path))
        length += len(parts[-1]) + 2
        if length > longest:
            _refuse_length(path, longest)
    return "\n\n".join(parts)


def _refuse_length(path: Path, longest: int) -> NoReturn:
    raise CalibrationError(
        f"{path} has more than {longest:,} characters, and perplexity takes a text as a whole; give a part of it"
    )


def _plain(document: Document, path: Path) -> str:
    if isinstance(document, Instruction):
        return document.prompt + document.response
    if isinstance(document, str):
        return document
    where = document.where if isinstance(document, Conversation) else path
    raise CalibrationError(f"{where} is a conversation; perplexity is measured on rows with `text`: give it as text")


def _read(path: Path, longest: int = -1) -> str:
    """The content of a text file; one of more than ``longest`` characters is refused before it fills the memory."""
    try:
        with open_text(path) as file:
            content = file.read(longest + 1 if longest >= 0 else -1)
            if 0 <= longest < len(content):
                _refuse_length(path, longest)
            return content
    except CalibrationError:
        raise
    except Exception as error:  # gzip and zstd have errors of their own
        hint = "" if path.parent.name or path.suffix else f" (named texts: {', '.join((*CORPORA, assets.DEMO))})"
        raise CalibrationError(f"cannot read the text {path}: {error}{hint}") from error


def _from_hub(name: str, corpus: Corpus) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"'{name}' comes from the hub: pip install 'slimgpt[hub]', or give --data-dir with its file"
        ) from None
    try:
        rows = load_dataset(**corpus.hub)
        return [row[corpus.field] for row, _ in zip(rows, range(corpus.max_rows or len(rows)))]
    except Exception as error:
        reason = one_line(error)
        raise CalibrationError(
            f"cannot fetch '{name}' from the hub ({reason}); give --data-dir with {corpus.files[0]} in it"
        ) from error
