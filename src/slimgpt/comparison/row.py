"""A row of the table of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from slimgpt.comparison.differences import Difference
from slimgpt.comparison.spread import Spread

SMALLEST_CHANGE = 0.005
"""A ratio nearer to 1 is no change where no standard error is known."""


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of all models, as a row of the table.

    Args:
        group: heading above the row.
        values: one per model, of several runs their mean; ``None`` where it was not measured.
        style: format specification of the values.
        better: ``"less"`` or ``"more"``; empty where neither is better.
        note: remark below the name.
        differences: from the base, one per model; empty for what is no sample of questions or tokens.
        comparable: whether the values are of the same kind, so that a ratio says something.
        spreads: over the runs, one per model; empty where there was one run each.
    """

    group: str
    name: str
    values: tuple[float | None, ...]
    style: str
    better: str = ""
    note: str = ""
    differences: tuple[Difference | None, ...] = ()
    comparable: bool = True
    spreads: tuple[Spread | None, ...] = ()

    def text(self, index: int) -> str:
        """The formatted value of a model."""
        value = self.values[index]
        return "-" if value is None else format(value, self.style)

    def spread_text(self, index: int) -> str:
        """Standard deviation over the runs of a model, and the standard error of one of them where it is known; empty
        where all runs are equal."""
        spread = self.spreads[index] if self.spreads else None
        if spread is None or not spread.deviation:
            return ""
        of_one = "" if spread.stderr is None else f", SE of one {self._error(spread.stderr)}"
        return f"SD of {spread.runs} {self._error(spread.deviation)}{of_one}"

    def _error(self, value: float) -> str:
        """An error in the style of the values: of shares in points, of numbers with two digits that count."""
        if self.style.endswith("%"):
            return f"{100 * value:.1f}"
        return f"{value:.2g}" if value < 100 else f"{value:,.0f}"

    def change(self, index: int) -> float | None:
        """Ratio of a model's value to the base's; ``None`` for the base and for values that are missing or not
        comparable."""
        value, base = self.values[index], self.values[0]
        return value / base if index and value is not None and base and self.comparable else None

    def change_text(self, index: int) -> str:
        """The change in words: of scores what is left in percent of the base, of all else a ratio; with the difference
        and its standard error where they are known."""
        ratio = self.change(index)
        if ratio is None:
            return ""
        apart = self.differences[index] if self.differences else None
        if self.style.endswith("%"):
            points = "" if apart is None else f", {100 * apart.value:+.1f} ± {100 * apart.stderr:.1f} points"
            return f"{ratio:.1%} of the base{points}"
        return f"x {ratio:.3f}" + ("" if apart is None else f", ln {apart.value:+.3f} ± {apart.stderr:.3f}")

    def verdict(self, index: int) -> str:
        """``good`` or ``bad``; empty where neither is better, or the change may be chance."""
        ratio = self.change(index)
        if ratio is None or not self.better:
            return ""
        if self.differences:
            apart = self.differences[index]
            changed = apart is not None and apart.significant
        else:
            changed = abs(ratio - 1) >= SMALLEST_CHANGE
        return ("good" if (ratio > 1) == (self.better == "more") else "bad") if changed else ""
