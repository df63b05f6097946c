"""The result of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.comparison.differences import (
    Difference,
    passkey_difference,
    perplexity_difference,
    recovery,
    task_difference,
)
from slimgpt.comparison.measure import CompareConfig, ModelResult
from slimgpt.comparison.timing import METRIC_FORMATS, Timings, same_type
from slimgpt.evaluation.tasks import GENERATED_METRICS, answers, flips, metric_of

SMALLEST_CHANGE = 0.005
"""A ratio nearer to 1 is no change where no standard error is known."""


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
                cells.append(row.text(index) + (f" ({change})" if change else ""))
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)

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
        differences: from the base, one per model; empty for what is no sample of questions or tokens.
        comparable: whether the values are of the same kind, so that a ratio says something.
    """

    group: str
    name: str
    values: tuple[float | None, ...]
    style: str
    better: str = ""
    note: str = ""
    differences: tuple[Difference | None, ...] = ()
    comparable: bool = True

    def text(self, index: int) -> str:
        """The formatted value of a model."""
        value = self.values[index]
        return "-" if value is None else format(value, self.style)

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


def _rows(comparison: Comparison) -> Iterator[ComparisonRow]:
    sides = comparison.sides
    yield ComparisonRow("size", "parameters", tuple(float(side.parameters) for side in sides), ",.0f", "less")
    if comparison.timings:
        by_model = {row.model: row for row in reversed(comparison.timings.rows)}
        order = list(dict.fromkeys(row.model for row in comparison.timings.rows))
        rows = [by_model[name] for name in order]
        # One model may be quantised: its ratio in bytes is then no effect of pruning.
        alike = same_type(rows)
        stored = ", ".join(f"{row.bytes / row.parameters:.2g}" for row in rows)
        note = "" if alike else f"stored with {stored} bytes per parameter, so these are not set against each other"
        sizes = tuple(row.bytes / 1e6 for row in rows)
        yield ComparisonRow("size", "MB on disk", sizes, ",.1f", "less", note, comparable=alike)
        if not alike:
            halves = tuple(2.0 * row.parameters / 1e6 for row in rows)
            yield ComparisonRow("size", "MB with 16 bits per parameter", halves, ",.1f", "less")
    for index, (text, first) in enumerate(sides[0].perplexities):
        values = tuple(side.perplexities[index][1] for side in sides)
        notes = [f"{side.name}: {side.leaks[text]}" for side in sides if text in side.leaks]
        place = f"{Path(text).name}, window {first.window}"
        measured = tuple(perplexity_difference(value) for value in values)
        yield ComparisonRow(
            "quality",
            f"perplexity, {place}",
            tuple(v.perplexity for v in values),
            ",.2f",
            "less",
            "; ".join(notes),
            measured if any(measured) else (),
        )
        divergences = [value.divergence for value in values]
        if any(divergences):
            nats = tuple(d and d.kl.mean for d in divergences)
            apart = [f"{side.name}: ± {d.kl.stderr:.4f}" for side, d in zip(sides, divergences) if d]
            note = f"nats per token; standard error, {'; '.join(apart)}"
            yield ComparisonRow("quality", f"KL from {sides[0].name}, {place}", nats, ".4f", "less", note)
            bits = tuple(d and d.bits_per_byte for d in divergences)
            yield ComparisonRow("quality", f"the same in bits per byte, {place}", bits, ".4f", "less")
            same = tuple(d and d.same_top for d in divergences)
            apart = [f"{side.name}: ± {d.same_top_stderr:.1%}" for side, d in zip(sides, divergences) if d]
            note = f"standard error, {'; '.join(apart)}"
            yield ComparisonRow("quality", f"same most likely token, {place}", same, ".1%", "more", note)
    tasks = [side.tasks for side in sides]
    if tasks[0] is not None:
        for task, metrics in tasks[0].scores.items():
            metric = metric_of(metrics) or next(iter(metrics))
            values = tuple(t.scores[task].get(metric) if t else None for t in tasks)
            degenerate = [(side.name, side.tasks.degenerate_tasks().get(task)) for side in sides if side.tasks]
            notes = [f"{name} answers {words} of the questions" for name, words in degenerate if words]
            style = ".1%" if metric.startswith("acc") or metric in GENERATED_METRICS else ".4g"
            apart = tuple(task_difference(tasks[0], t, task) for t in tasks)
            yield ComparisonRow("tasks", f"{task} ({metric})", values, style, "more", "; ".join(notes), apart)
            if task in tasks[0].endings:
                endings = [t.endings.get(task) if t else None for t in tasks]
                bad = tuple(each and each.either for each in endings)
                apart = [
                    f"{side.name}: {e.loops:.1%} loop, {e.unstopped:.1%} are cut"
                    for side, e in zip(sides, endings)
                    if e
                ]
                yield ComparisonRow(
                    "tasks", f"{task}: loop or never stop", bad, ".1%", "less", "; ".join(apart), (None,) * len(sides)
                )
        if tasks[0].mean is not None:
            base = answers(tasks[0])
            means = tuple(t.mean if t else None for t in tasks)
            apart = tuple(task_difference(tasks[0], t) for t in tasks)
            yield ComparisonRow("tasks", "mean", means, ".1%", "more", differences=apart)
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
            unknown = (None,) * len(sides)  # the error by position: nothing is called good or bad
            yield ComparisonRow("long texts", f"perplexity, {positions}", values, ",.2f", "less", differences=unknown)
    if sides[0].passkey:
        for length in sides[0].passkey.found:
            shares = tuple(side.passkey.found[length] if side.passkey else None for side in sides)
            apart = tuple(passkey_difference(sides[0].passkey, side.passkey, length) for side in sides)
            name = f"pass key found in {length:,} tokens"
            yield ComparisonRow("long texts", name, shares, ".0%", "more", differences=apart)
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
