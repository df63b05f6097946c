"""A text of many domains that is part of the package: prose, dialogue, letters, code; written for it (Apache-2.0)."""

from __future__ import annotations

from importlib import resources


def general_text() -> str:
    """The text, 16 kB of English, code and data, an empty line between two pieces."""
    return resources.files("slimgpt.assets").joinpath("general.txt").read_text(encoding="utf-8")
