"""One row of the comparison, and the folder in which finished rows are kept.

A row is a model, a method, a ratio and what differs from the run's settings. All of it, with the texts' digests,
makes the row's key: another setting is another file, and an interrupted run goes on where it stopped. Measurements
are kept one by one inside the row, each with its own settings, so that a longer text or the tasks can be added.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """What is to be measured.

    Args:
        model: a key of ``MODELS``.
        method: a key of ``METHODS``, or ``dense``.
        ratio: the share of the decoder's parameters to remove; 0 for ``dense``.
        repair: a baseline that does not repair is followed by our repair.
        changes: what differs from the run's settings: a calibration setting or an argument of ``slimgpt.prune``.
    """

    model: str
    method: str
    ratio: float
    repair: bool = False
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        """The method with what differs, such as ``flap+repair`` or ``paper[num_samples=32]``."""
        changes = ",".join(f"{name}={value}" for name, value in self.changes)
        return self.method + ("+repair" if self.repair else "") + (f"[{changes}]" if changes else "")

    @property
    def name(self) -> str:
        """``model/method/ratio``, what ``--rows`` filters."""
        return f"{self.model}/{self.title}/{self.ratio:.2f}"

    def matches(self, pattern: str) -> bool:
        """Whether the name fits a pattern with ``*`` and ``?``, or holds it."""
        return fnmatch.fnmatchcase(self.name, pattern) or pattern in self.name


@dataclass
class Result:
    """What a row has given so far; what its file holds.

    Args:
        row: the row, as plain values.
        settings: everything that decides the slim model; the key is its digest.
        found: the slim model: parameters, share achieved, widths, seconds.
        measures: by name a value, the settings it depends on, and its seconds.
    """

    row: dict[str, Any]
    settings: dict[str, Any]
    found: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def value(self, measure: str) -> float | None:
        """The value of a measure, if it has been taken."""
        return self.measures.get(measure, {}).get("value")

    def has(self, measure: str, settings: dict[str, Any]) -> bool:
        """Whether a measure has been taken with these settings."""
        return self.measures.get(measure, {}).get("settings") == settings


class Store:
    """Finished rows, one JSON file each."""

    def __init__(self, folder: Path):
        self.folder = folder

    def file(self, row: Row, settings: dict[str, Any]) -> Path:
        """Where a row is kept."""
        key = hashlib.sha256(json.dumps([asdict(row), settings], sort_keys=True).encode()).hexdigest()[:12]
        name = row.name.translate(str.maketrans({"/": "-", "[": "-", "]": "", ",": "-", "=": "-"}))
        return self.folder / f"{name}-{key}.json"

    def get(self, row: Row, settings: dict[str, Any]) -> Result:
        """What is known of a row; empty if nothing is."""
        file = self.file(row, settings)
        if file.is_file():
            return Result(**json.loads(file.read_text(encoding="utf-8")))
        return Result(json.loads(json.dumps(asdict(row))), settings)

    @contextmanager
    def claim(self, row: Row, settings: dict[str, Any]) -> Iterator[bool]:
        """Whether this process may work on a row: no other does, until this is over or the process ends."""
        claims = self.folder / ".claims"
        claims.mkdir(parents=True, exist_ok=True)
        lock = FileLock(claims / f"{self.file(row, settings).stem}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def put(self, row: Row, result: Result) -> None:
        """Keep what is known of a row; the file is whole at any time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.file(row, result.settings)
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
        unfinished.rename(file)
