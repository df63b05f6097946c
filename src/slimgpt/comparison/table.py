"""The rows of the table of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slimgpt.comparison.differences import (
    Difference,
    difference_over,
    pairs_of,
    passkey_difference,
    perplexity_difference,
    tasks_difference_over,
)
from slimgpt.comparison.model_result import ModelResult
from slimgpt.comparison.row import ComparisonRow
from slimgpt.comparison.spread import spread_of
from slimgpt.comparison.timing import METRIC_FORMATS, Timing, Timings, same_type
from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.tasks import GENERATED_METRICS, TaskScores, answers, flips, metric_of

Sides = Sequence[ModelResult]
Figure = Callable[[ModelResult], float | None]
"""A figure of one run."""


def table_rows(sides: Sides, timings: Timings | None, batches: Sequence[int]) -> Iterator[ComparisonRow]:
    """All rows, by group.

    Args:
        sides: the results of the base, then of the others.
        batches: prompts at once of the timings.
    """
    yield _row(sides, ("size", "parameters"), lambda run: float(run.parameters), ",.0f", "less")
    if timings:
        yield from _sizes(timings)
    for index in range(len(sides[0].perplexities)):
        yield from _text_rows(sides, index)
    if sides[0].tasks is not None:
        yield from _task_rows(sides, sides[0].tasks)
    yield from _long_text_rows(sides)
    if timings:
        yield from _speed_rows(timings, batches)


def _row(
    sides: Sides,
    place: tuple[str, str],
    figure: Figure,
    style: str,
    better: str = "",
    *,
    stderr: Figure = lambda _: None,
    note: str = "",
    differences: tuple[Difference | None, ...] = (),
) -> ComparisonRow:
    """A row with means over the runs.

    Args:
        place: group and name of the row.
        stderr: the standard error of a figure.
    """
    spreads = tuple(spread_of([figure(run) for run in side.runs], map(stderr, side.runs)) for side in sides)
    return ComparisonRow(
        *place,
        tuple(spread and spread.mean for spread in spreads),
        style,
        better,
        note,
        differences,
        spreads=spreads if any(side.repeats for side in sides) else (),
    )


def _sizes(timings: Timings) -> Iterator[ComparisonRow]:
    by_model = {row.model: row for row in reversed(timings.rows)}
    rows: list[Timing] = [by_model[name] for name in dict.fromkeys(row.model for row in timings.rows)]
    # One model may be quantised: its ratio in bytes is then no effect of pruning.
    alike = same_type(rows)
    stored = ", ".join(f"{row.bytes / row.parameters:.2g}" for row in rows)
    note = "" if alike else f"stored with {stored} bytes per parameter, so no ratio is shown"
    sizes = tuple(row.bytes / 1e6 for row in rows)
    yield ComparisonRow("size", "MB on disk", sizes, ",.1f", "less", note, comparable=alike)
    if not alike:
        halves = tuple(2.0 * row.parameters / 1e6 for row in rows)
        yield ComparisonRow("size", "MB with 16 bits per parameter", halves, ",.1f", "less")


def _text_rows(sides: Sides, index: int) -> Iterator[ComparisonRow]:
    """Perplexity on a text at a window, and the divergence from the base."""
    text, first = sides[0].perplexities[index]
    place = f"{Path(text).name}, window {first.window}"

    def result(run: ModelResult) -> Perplexity:
        return run.perplexities[index][1]

    def apart(_: ModelResult, slim: ModelResult) -> Difference | None:
        return perplexity_difference(result(slim))

    def stderr(run: ModelResult) -> float | None:
        error = result(run).log_stderr
        return None if error is None else error * result(run).perplexity

    measured = (None, *(difference_over(pairs_of(sides[0], side), apart) for side in sides[1:]))
    leaks = "; ".join(f"{side.name}: {side.leaks[text]}" for side in sides if text in side.leaks)
    yield _row(
        sides,
        ("quality", f"perplexity, {place}"),
        lambda run: result(run).perplexity,
        ",.2f",
        "less",
        stderr=stderr,
        note=leaks,
        differences=measured if any(measured) else (),
    )
    divergences = [(side.name, divergence) for side in sides if (divergence := result(side).divergence)]
    if not divergences:
        return
    errors = "; ".join(f"{name}: ± {one.kl.stderr:.4f}" for name, one in divergences)
    yield _row(
        sides,
        ("quality", f"KL from {sides[0].name}, {place}"),
        lambda run: (one := result(run).divergence) and one.kl.mean,
        ".4f",
        "less",
        stderr=lambda run: (one := result(run).divergence) and one.kl.stderr,
        note=f"nats per token; standard error{_of_one(sides)}, {errors}",
    )
    yield _row(
        sides,
        ("quality", f"KL from {sides[0].name} in bits per byte, {place}"),
        lambda run: (one := result(run).divergence) and one.bits_per_byte,
        ".4f",
        "less",
    )
    errors = "; ".join(f"{name}: ± {one.same_top_stderr:.1%}" for name, one in divergences)
    yield _row(
        sides,
        ("quality", f"same most likely token, {place}"),
        lambda run: (one := result(run).divergence) and one.same_top,
        ".1%",
        "more",
        stderr=lambda run: (one := result(run).divergence) and one.same_top_stderr,
        note=f"standard error{_of_one(sides)}, {errors}",
    )


def _of_one(sides: Sides) -> str:
    return " of the first run" if any(side.repeats for side in sides) else ""


def _task_rows(sides: Sides, base: TaskScores) -> Iterator[ComparisonRow]:
    """The score of every task, how its answers end, the mean, and flips."""
    pairs = [pairs_of(sides[0], side) for side in sides]
    for task, metrics in base.scores.items():
        metric = metric_of(metrics) or next(iter(metrics))
        degenerate = [(side.name, side.tasks.degenerate_tasks().get(task)) for side in sides if side.tasks]
        notes = [f"{name} answers {words} of the questions" for name, words in degenerate if words]
        yield _row(
            sides,
            ("tasks", f"{task} ({metric})"),
            _score(task, metric),
            ".1%" if metric.startswith("acc") or metric in GENERATED_METRICS else ".4g",
            "more",
            stderr=_score(task, f"{metric}_stderr"),
            note="; ".join(notes),
            differences=tuple(tasks_difference_over(of_side, task) for of_side in pairs),
        )
        if task in base.endings:
            yield _endings(sides, task)
    if base.mean is None:
        return
    yield _row(
        sides,
        ("tasks", "mean"),
        lambda run: run.tasks and run.tasks.mean,
        ".1%",
        "more",
        stderr=lambda run: run.tasks and run.tasks.mean_stderr,
        differences=tuple(tasks_difference_over(of_side) for of_side in pairs),
    )
    changed = [[_flips(*pair) for pair in of_side] for of_side in pairs[1:]]
    if any(share is not None for of_side in changed for share in of_side):
        spreads = (None, *(spread_of(of_side, [None] * len(of_side)) for of_side in changed))
        yield ComparisonRow(
            "tasks",
            "flips",
            tuple(spread and spread.mean for spread in spreads),
            ".1%",
            "less",
            "questions that the base gets right and the slim model wrong, or the other way round",
            spreads=spreads if any(side.repeats for side in sides) else (),
        )


def _score(task: str, metric: str) -> Figure:
    return lambda run: run.tasks and run.tasks.scores[task].get(metric)


def _endings(sides: Sides, task: str) -> ComparisonRow:
    """The share of answers that loop or never stop."""

    def bad(run: ModelResult) -> float | None:
        ending = run.tasks and run.tasks.endings.get(task)
        return ending.either if ending else None

    def stderr(run: ModelResult) -> float | None:
        ending = run.tasks and run.tasks.endings.get(task)
        return math.sqrt(ending.either * (1 - ending.either) / ending.answers) if ending else None

    kinds = [(side.name, side.tasks.endings.get(task)) for side in sides if side.tasks]
    note = "; ".join(f"{name}: {e.loops:.1%} loop, {e.unstopped:.1%} are cut" for name, e in kinds if e)
    place = ("tasks", f"{task}: loop or never stop")
    return _row(sides, place, bad, ".1%", "less", stderr=stderr, note=note, differences=(None,) * len(sides))


def _flips(base: ModelResult, slim: ModelResult) -> float | None:
    return flips(answers(base.tasks), answers(slim.tasks)) if base.tasks and slim.tasks else None


def _long_text_rows(sides: Sides) -> Iterator[ComparisonRow]:
    first = sides[0].by_position
    for start in (first and first.by_position) or ():
        assert first is not None
        last = min(2 * start, first.window) - 1

        def at(run: ModelResult, start: int = start) -> float | None:
            values = run.by_position and run.by_position.by_position
            return values[start] if values else None

        place = (
            "long texts",
            f"perplexity, positions {start}-{last}" if last > start else f"perplexity, position {start}",
        )
        # Without the error by position nothing is called good or bad.
        yield _row(sides, place, at, ",.2f", "less", differences=(None,) * len(sides))
    for length in sides[0].passkey.found if sides[0].passkey else ():

        def apart(base: ModelResult, slim: ModelResult, length: int = length) -> Difference | None:
            return base.passkey and passkey_difference(base.passkey, slim.passkey, length)

        yield _row(
            sides,
            ("long texts", f"pass key found in {length:,} tokens"),
            lambda run, length=length: run.passkey and run.passkey.found[length],
            ".0%",
            "more",
            differences=tuple(difference_over(pairs_of(sides[0], side), apart) for side in sides),
        )


def _speed_rows(timings: Timings, batches: Sequence[int]) -> Iterator[ComparisonRow]:
    for batch in batches:
        rows = [row for row in timings.rows if row.batch == batch]
        for name, (title, scale, style, better) in METRIC_FORMATS.items():
            values = [getattr(row, name) for row in rows]
            yield ComparisonRow(
                f"speed, batch {batch}", title, tuple(None if v is None else v / scale for v in values), style, better
            )
