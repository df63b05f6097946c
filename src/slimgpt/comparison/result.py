"""The result of a comparison."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from slimgpt.comparison.differences import recovery
from slimgpt.comparison.model_result import CompareConfig, ModelResult
from slimgpt.comparison.row import ComparisonRow
from slimgpt.comparison.table import table_rows
from slimgpt.comparison.timing import Timings
from slimgpt.io.result import Result


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """The result of :func:`slimgpt.compare`.

    Args:
        sides: results of the base, then of the slim models in the order they were passed.
        timings: speed of the models in the same order; ``None`` if not measured.
        wanted: settings of the comparison.
    """

    sides: tuple[ModelResult, ...]
    timings: Timings | None
    wanted: CompareConfig

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        base, *slim = self.sides
        return {
            "models": [base.to_json(), *({**side.to_json(), "recovery": recovery(base, side)} for side in slim)],
            "speed": self.timings and self.timings.to_json(),
            "wanted": asdict(self.wanted),
        }

    def markdown(self) -> str:
        """The table as Markdown."""
        names = [side.name for side in self.sides]
        lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
        for row in self.table():
            cells = []
            for index in range(len(names)):
                change = row.change_text(index)
                notes = "; ".join(text for text in (row.spread_text(index), change) if text)
                cells.append(row.text(index) + (f" ({notes})" if notes else ""))
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def table(self) -> list[ComparisonRow]:
        """The rows of the table, each with one value per model."""
        return list(table_rows(self.sides, self.timings, self.wanted.batches))
