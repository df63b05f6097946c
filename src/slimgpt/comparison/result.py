"""The result of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.comparison.measure import CompareConfig, ModelResult
from slimgpt.comparison.timing import METRIC_FORMATS, Timings
from slimgpt.evaluation.tasks import answers, difference, flips, metric_of


@dataclass(frozen=True)
class Comparison:
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
        return {
            "models": [side.to_json() for side in self.sides],
            "speed": self.timings and self.timings.to_json(),
            "wanted": asdict(self.wanted),
        }

    def table(self) -> list[ComparisonRow]:
        """The rows of the table, each with one value per model."""
        return list(_rows(self))


@dataclass(frozen=True)
class ComparisonRow:
    """One metric of all models, as a row of the table.

    Args:
        group: heading above the row.
        values: one per model; ``None`` where it was not measured.
        style: format specification of the values.
        better: ``"less"`` or ``"more"``; empty where neither is better.
        note: remark below the name.
    """

    group: str
    name: str
    values: tuple[float | None, ...]
    style: str
    better: str = ""
    note: str = ""

    def text(self, index: int) -> str:
        """The formatted value of a model."""
        value = self.values[index]
        return "-" if value is None else format(value, self.style)

    def change(self, index: int) -> float | None:
        """Ratio of a model's value to the base's; ``None`` for the base and missing values."""
        value, base = self.values[index], self.values[0]
        return value / base if index and value is not None and base else None


def _rows(comparison: Comparison) -> Iterator[ComparisonRow]:
    sides = comparison.sides
    yield ComparisonRow("size", "parameters", tuple(float(side.parameters) for side in sides), ",.0f", "less")
    if comparison.timings:
        by_model = {row.model: row for row in reversed(comparison.timings.rows)}
        order = list(dict.fromkeys(row.model for row in comparison.timings.rows))
        sizes = tuple(float(by_model[name].bytes) for name in order)
        bytes_per_parameter = [size / side.parameters for size, side in zip(sizes, sides)]
        # One model may be quantised: its ratio in bytes is then no effect of pruning.
        same_type = max(bytes_per_parameter) < 1.5 * min(bytes_per_parameter)
        stored = ", ".join(f"{size:.2g}" for size in bytes_per_parameter)
        note = "" if same_type else f"stored with {stored} bytes per parameter"
        yield ComparisonRow("size", "bytes on disk", sizes, ",.0f", "less", note)
    for index, (text, first) in enumerate(sides[0].perplexities):
        values = tuple(side.perplexities[index][1] for side in sides)
        notes = [f"{side.name}: {side.leaks[text]}" for side in sides if text in side.leaks]
        name = f"perplexity, {Path(text).name}, window {first.window}"
        yield ComparisonRow("quality", name, tuple(v.perplexity for v in values), ",.2f", "less", "; ".join(notes))
    tasks = [side.tasks for side in sides]
    if tasks[0] is not None:
        for task, metrics in tasks[0].scores.items():
            metric = metric_of(metrics) or next(iter(metrics))
            values = tuple(t.scores[task].get(metric) if t else None for t in tasks)
            degenerate = [(side.name, side.tasks.degenerate_tasks().get(task)) for side in sides if side.tasks]
            notes = [f"{name} answers {words} of the questions" for name, words in degenerate if words]
            style = ".1%" if metric.startswith("acc") else ".4g"
            yield ComparisonRow("tasks", f"{task} ({metric})", values, style, "more", "; ".join(notes))
        if tasks[0].mean is not None:
            base = answers(tasks[0])
            differences = [(side.name, difference(base, answers(side.tasks))) for side in sides[1:] if side.tasks]
            notes = [f"{name}: {100 * one[0]:+.1f} ± {100 * one[1]:.1f} points" for name, one in differences if one]
            note = f"on the same questions, with standard error, {'; '.join(notes)}" if notes else ""
            yield ComparisonRow("tasks", "mean", tuple(t.mean if t else None for t in tasks), ".1%", "more", note)
            changed = [flips(base, answers(side.tasks)) if side.tasks else None for side in sides[1:]]
            if any(share is not None for share in changed):
                note = "questions that the base gets right and the slim model wrong, or the other way round"
                yield ComparisonRow("tasks", "flips", (None, *changed), ".1%", "less", note)
    if sides[0].by_position and sides[0].by_position.by_position:
        for start in sides[0].by_position.by_position:
            last = min(2 * start, sides[0].by_position.window) - 1
            values = tuple(
                s.by_position.by_position[start] for s in sides if s.by_position and s.by_position.by_position
            )
            positions = f"positions {start}-{last}" if last > start else f"position {start}"
            yield ComparisonRow("long texts", f"perplexity, {positions}", values, ",.2f", "less")
    if sides[0].passkey:
        for length in sides[0].passkey.found:
            shares = tuple(side.passkey.found[length] if side.passkey else None for side in sides)
            yield ComparisonRow("long texts", f"pass key found in {length:,} tokens", shares, ".0%", "more")
    yield from _speed_rows(comparison)


def _speed_rows(comparison: Comparison) -> Iterator[ComparisonRow]:
    if not comparison.timings:
        return
    for batch in comparison.wanted.batches:
        rows = [row for row in comparison.timings.rows if row.batch == batch]
        for name, (title, scale, style, better) in METRIC_FORMATS.items():
            values = [getattr(row, name) for row in rows]
            yield ComparisonRow(
                f"speed, batch {batch}", title, tuple(None if v is None else v / scale for v in values), style, better
            )
