"""The result of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.comparison.measure import CompareConfig, Side
from slimgpt.comparison.timing import FIGURES, Timings
from slimgpt.evaluation.tasks import answers, difference, flips, metric_of


@dataclass(frozen=True)
class Comparison:
    """The base first, then the slim models in the order given."""

    sides: tuple[Side, ...]
    timings: Timings | None
    wanted: CompareConfig

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {
            "models": [side.to_json() for side in self.sides],
            "speed": self.timings and self.timings.to_json(),
            "wanted": asdict(self.wanted),
        }

    def table(self) -> list[Row]:
        """The rows of the table: what, and a value for every model."""
        return list(_rows(self))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        group: under which heading it stands.
        values: one per model; ``None`` where it was not measured.
        style: a format specification, ``%`` and units handled by :meth:`text`.
        better: ``"less"``, ``"more"``, or nothing.
    """

    group: str
    name: str
    values: tuple[float | None, ...]
    style: str
    better: str = ""
    note: str = ""

    def text(self, index: int) -> str:
        """The value of a model as it is printed."""
        value = self.values[index]
        return "-" if value is None else format(value, self.style)

    def change(self, index: int) -> float | None:
        """The value over the base's."""
        value, base = self.values[index], self.values[0]
        return value / base if index and value is not None and base else None


def _rows(found: Comparison) -> Iterator[Row]:
    sides = found.sides
    yield Row("size", "parameters", tuple(float(side.parameters) for side in sides), ",.0f", "less")
    if found.timings:
        first = {row.model: row for row in reversed(found.timings.rows)}
        order = list(dict.fromkeys(row.model for row in found.timings.rows))
        sizes = tuple(float(first[name].bytes) for name in order)
        each = [size / side.parameters for size, side in zip(sizes, sides)]
        # Weights of one model may be quantised, which its ratio to others would hide.
        alike = max(each) < 1.5 * min(each)
        note = "" if alike else f"stored with {', '.join(f'{size:.2g}' for size in each)} bytes per parameter"
        yield Row("size", "bytes on disk", sizes, ",.0f", "less", note)
    for index, (text, one) in enumerate(sides[0].perplexities):
        values = tuple(side.perplexities[index][1] for side in sides)
        notes = [f"{side.name}: {side.leaks[text]}" for side in sides if text in side.leaks]
        name = f"perplexity, {Path(text).name}, window {one.window}"
        yield Row("quality", name, tuple(v.perplexity for v in values), ",.2f", "less", "; ".join(notes))
    tasks = [side.tasks for side in sides]
    if tasks[0] is not None:
        for task, metrics in tasks[0].scores.items():
            metric = metric_of(metrics) or next(iter(metrics))
            values = tuple(t.scores[task].get(metric) if t else None for t in tasks)
            sided = [(side.name, side.tasks.degenerate_tasks().get(task)) for side in sides if side.tasks]
            notes = [f"{name} answers {words} of the questions" for name, words in sided if words]
            style = ".1%" if metric.startswith("acc") else ".4g"
            yield Row("tasks", f"{task} ({metric})", values, style, "more", "; ".join(notes))
        if tasks[0].mean is not None:
            base = answers(tasks[0])
            apart = [(side.name, difference(base, answers(side.tasks))) for side in sides[1:] if side.tasks]
            notes = [f"{name}: {100 * one[0]:+.1f} ± {100 * one[1]:.1f} points" for name, one in apart if one]
            note = f"on the same questions, with standard error, {'; '.join(notes)}" if notes else ""
            yield Row("tasks", "mean", tuple(t.mean if t else None for t in tasks), ".1%", "more", note)
            changed = [flips(base, answers(side.tasks)) if side.tasks else None for side in sides[1:]]
            if any(share is not None for share in changed):
                note = "questions that the base gets right and the slim model wrong, or the other way round"
                yield Row("tasks", "flips", (None, *changed), ".1%", "less", note)
    if sides[0].by_position and sides[0].by_position.by_position:
        for start in sides[0].by_position.by_position:
            last = min(2 * start, sides[0].by_position.window) - 1
            values = tuple(
                s.by_position.by_position[start] for s in sides if s.by_position and s.by_position.by_position
            )
            place = f"positions {start}-{last}" if last > start else f"position {start}"
            yield Row("long texts", f"perplexity, {place}", values, ",.2f", "less")
    if sides[0].passkey:
        for length in sides[0].passkey.found:
            shares = tuple(side.passkey.found[length] if side.passkey else None for side in sides)
            yield Row("long texts", f"pass key found in {length:,} tokens", shares, ".0%", "more")
    yield from _speed_rows(found)


def _speed_rows(found: Comparison) -> Iterator[Row]:
    if not found.timings:
        return
    for batch in found.wanted.batches:
        rows = [row for row in found.timings.rows if row.batch == batch]
        for name, (title, scale, style, better) in FIGURES.items():
            values = [getattr(row, name) for row in rows]
            yield Row(
                f"speed, batch {batch}", title, tuple(None if v is None else v / scale for v in values), style, better
            )
