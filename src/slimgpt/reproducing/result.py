"""The result of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TUNED = ", tuned"
"""What the name of a row gets that was trained after pruning."""


@dataclass(frozen=True)
class Result:
    """One line of the finished table.

    Args:
        name: the row's, with :data:`TUNED` after training.
        figures: by column.
        paper: what the paper states, by column.
        details: protocols and reports behind the figures.
    """

    name: str
    figures: dict[str, float]
    paper: dict[str, float]
    details: dict[str, Any]
