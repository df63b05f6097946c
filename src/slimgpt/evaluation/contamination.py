"""Contamination: calibration or training text that overlaps the evaluated text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slimgpt import assets
from slimgpt.calibration.documents import AUTO, Document, read_documents
from slimgpt.errors import CalibrationError
from slimgpt.evaluation.corpora import Text

CORPUS_WORDS = {
    "WikiText": re.compile(r"wikitext|wiki\.(test|train|valid)"),
    "C4": re.compile(r"(^|[^a-z0-9])c4([^a-z0-9]|$)"),
    "Penn Treebank": re.compile(r"(^|[^a-z0-9])ptb|penn_?treebank"),
    "Alpaca": re.compile(r"alpaca"),
}
"""Words in the name of a source that tell the corpus."""

MATCH_CHARS = 60
"""Characters compared per line: enough that a match is no coincidence."""


def contamination_note(report: Mapping[str, Any] | None, text: Text) -> str | None:
    """A warning about overlap of the text with calibration or training text; ``None`` where no overlap is known.

    Compared are the names of the corpora, and, where the source of the calibration text is a file that is still
    there, the lines themselves.

    Args:
        report: the content of ``slimgpt.json``; ``None`` for a dense model.
        text: what the model is evaluated on.
    """
    for purpose, source in _sources(report or {}):
        if source == AUTO:
            continue
        if source == text.name == assets.DEMO:
            return f"{purpose} on other speeches of the same corpus"
        share = _overlap(source, text)
        if share:
            return f"{purpose} on {share:.0%} of this text: the figure flatters"
        corpus = _corpus(source)
        if source == text.name or (corpus is not None and corpus in (_corpus(text.name), _corpus(str(text.file)))):
            return f"{purpose} on the same corpus ({corpus or source}): the figure may flatter"
    return None


def _sources(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text that the model was calibrated or trained on."""
    calibration = report.get("calibration") or {}
    for part in calibration.get("mixture") or [calibration]:
        if isinstance(part.get("source"), str):
            yield "calibrated", part["source"]
    for training in report.get("recovery") or ():
        for source in training.get("settings", {}).get("data") or ():
            yield "trained", str(source)


def _corpus(name: str) -> str | None:
    return next((corpus for corpus, words in CORPUS_WORDS.items() if words.search(name.lower())), None)


def _overlap(source: str, text: Text) -> float:
    """Share of long lines of the text, up to a hundred of them, that the calibration file holds."""
    path = Path(source).expanduser()
    if not path.exists() or source == assets.DEMO:
        return 0.0
    lines = [line.strip()[:MATCH_CHARS] for line in text.content.splitlines() if len(line.strip()) >= MATCH_CHARS]
    lines = lines[:: max(1, len(lines) // 100)][:100]
    if not lines:
        return 0.0
    missing = set(lines)
    try:
        for document in read_documents(source):
            content = _content(document)
            missing -= {line for line in missing if line in content}
    except CalibrationError:
        return 0.0
    return 1 - sum(line in missing for line in lines) / len(lines)


def _content(document: Document) -> str:
    if isinstance(document, str):
        return document
    if isinstance(document, list):
        return " ".join(str(message.get("content")) for message in document)
    return f"{document.prompt} {document.response}"
