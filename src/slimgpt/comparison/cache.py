"""What an unfinished comparison has measured, so that a killed one goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.journal import write_text


def kept_folder(output: Path) -> Path:
    """Where a comparison that will write ``output`` keeps what it has measured."""
    return output.parent / f".{output.name}.measured"


class Kept:
    """The measurements of one model, in a file that grows.

    Args:
        folder: the comparison's.
        about: what decides every measurement of this model, as JSON values: measurements of anything else are not
            seen.
    """

    def __init__(self, folder: Path, about: Any):
        self.file = folder / f"{hashlib.sha256(_key(about).encode()).hexdigest()[:16]}.json"
        self._values: dict[str, Any] = {}
        if self.file.is_file():
            self._values = json.loads(self.file.read_text(encoding="utf-8"))

    def __call__(self, settings: Any, measure: Callable[[], Any]) -> Any:
        """What was measured with these settings; measured now, and kept, if it was not.

        Args:
            settings: what else decides it, as JSON values.
            measure: gives JSON values.
        """
        key = _key(settings)
        if key not in self._values:
            value = measure()
            self._values[key] = json.loads(json.dumps(value))  # as it will be read back
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.file, json.dumps(self._values, indent=1) + "\n")
        return self._values[key]


def _key(values: Any) -> str:
    return json.dumps(values, sort_keys=True)
