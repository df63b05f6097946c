"""Working folder of a recovery run, from which a killed one resumes: ``.OUT.unfinished`` beside the output::

journal.json     the request; another one is refused
choices.json     settings chosen on this machine, and the seconds so far
teacher/         predictions of the dense model
states/          weights, optimizer and random numbers after the last evaluation and after the best one
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.journal import delete_unfinished, open_unfinished, unfinished_folder
from slimgpt.checkpoint.kept_files import read_values, reading, write_values

CHOICES_FILE = "choices.json"


class Workspace:
    """The working folder of the run that writes ``output``."""

    def __init__(self, output: Path):
        self.folder = unfinished_folder(output)
        self.seconds: dict[str, float] = {}
        self._choices: dict[str, Any] = {}

    def open(self, request: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """Begin or resume.

        Raises:
            ResumeError: an unfinished run of another request, or one that was not asked for.
        """
        request = json.loads(json.dumps(request))  # as it will be read back
        open_unfinished(self.folder, request, resume, overwrite, self.discard)
        if (choices := self.folder / CHOICES_FILE).is_file():
            values = read_values(choices)
            with reading(choices):
                self._choices = _checked(values)
        self.seconds = self._choices.setdefault("seconds", {})

    def choice(self, name: str, choose: Callable[[], Any]) -> Any:
        """The choice of the run that is resumed; ``choose()`` in a new run."""
        if name not in self._choices:
            self._choices[name] = choose()
            self._write()
        return self._choices[name]

    def add_seconds(self, part: str, seconds: float) -> None:
        """Add wall time to a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        if self.folder.is_dir():
            self._write()

    def discard(self) -> None:
        """Remove the folder."""
        delete_unfinished(self.folder)

    def _write(self) -> None:
        write_values(self.folder / CHOICES_FILE, self._choices)


def _checked(choices: Any) -> dict[str, Any]:
    """Choices as :class:`Workspace` writes them.

    Raises:
        TypeError: they are something else.
    """
    seconds = choices["seconds"]
    if not all(isinstance(value, (int, float)) for value in seconds.values()):
        raise TypeError("seconds must be numbers")
    if not all(isinstance(value, bool) for name, value in choices.items() if name != "seconds"):
        raise TypeError("choices must be true or false")
    return choices
