"""The result of a recipe row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TUNED = ", tuned"
"""Suffix of the name of a row that was trained after pruning."""


@dataclass(frozen=True)
class Result:
    """One line of the finished table.

    Args:
        name: the row's, with :data:`TUNED` after training.
        figures: by column.
        paper: the paper's figures, by column.
        details: protocols and reports behind the figures.
    """

    name: str
    figures: dict[str, float]
    paper: dict[str, float]
    details: dict[str, Any]
