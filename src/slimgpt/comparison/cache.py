"""Cache of finished measurements, from which a killed comparison resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.kept_files import read_values, write_values
from slimgpt.errors import ResumeError


def cache_folder(output: Path) -> Path:
    """The folder beside ``output`` that caches its measurements until the comparison is complete."""
    return output.parent / f".{output.name}.measured"


class MeasurementCache:
    """The finished measurements of one model, in a JSON file.

    Args:
        folder: the cache folder of the comparison.
        model_key: JSON values that identify model, dtype and versions; another key has another file.
    """

    def __init__(self, folder: Path, model_key: Any):
        self.file = folder / f"{hashlib.sha256(_canonical(model_key).encode()).hexdigest()[:16]}.json"
        self._values: dict[str, Any] = {}
        if self.file.is_file():
            with suppress(ResumeError):  # what is damaged is measured anew
                self._values = read_values(self.file)

    def get_or_measure(self, settings: Any, measure: Callable[[], Any]) -> Any:
        """The cached result for ``settings``, or a new one, which is cached.

        Args:
            settings: JSON values that identify the measurement.
            measure: returns the result as JSON values.
        """
        key = _canonical(settings)
        if key not in self._values:
            value = measure()
            self._values[key] = json.loads(json.dumps(value))  # equal to the value that a resumed run reads
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_values(self.file, self._values)
        return self._values[key]


def _canonical(values: Any) -> str:
    return json.dumps(values, sort_keys=True)
