"""Plots of a comparison: quality against size, tasks, widths, speed, and perplexity by position.

Every model has a colour and a marker of its own, in all plots; a legend below names them. Lines join only what belongs
to one model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from slimgpt.comparison.spread import spread_of
from slimgpt.evaluation.tasks import metric_of
from slimgpt.io.plotting import COLORS, new_figure, series_style

if TYPE_CHECKING:
    from slimgpt.comparison.result import Comparison

LONG_NAME = 18
"""Characters of a name from which on a legend has one column."""

WIDE_RANGE = 5.0
"""Ratio of the largest to the smallest value from which on a logarithmic axis has ticks at 1, 2, 5, 10."""


def figures(comparison: Comparison) -> list[Any]:
    """All plots that the measurements allow, one figure each."""
    drawn = []
    for panel in [*_quality_panels(comparison), *_other_panels(comparison)]:
        figure, (axis,) = _figure()
        panel(axis)
        _legend(figure, axis)
        drawn.append(figure)
    return drawn


def plot_quality(comparison: Comparison, file: Path) -> None:
    """Write quality against size, a panel per text and one for tasks, as a PNG or SVG by the file's suffix."""
    panels = _quality_panels(comparison)
    figure, axes = _figure(len(panels))
    for panel, axis in zip(panels, axes):
        panel(axis)
    _legend(figure, axes[0])
    figure.savefig(file, dpi=130)


Panel = Callable[[Any], None]


def _quality_panels(comparison: Comparison) -> list[Panel]:
    panels: list[Panel] = []
    for index, (text, base) in enumerate(comparison.sides[0].perplexities):
        values = [side.mean(lambda run, i=index: run.perplexities[i][1].perplexity) for side in comparison.sides]
        label = f"perplexity of {Path(text).name},\nwindow {base.window} (lower is better)"
        panels.append(lambda axis, values=values, label=label: _by_size(axis, comparison, values, label, log=True))
    means = [[run.tasks.mean if run.tasks else None for run in side.runs] for side in comparison.sides]
    tasks = comparison.sides[0].tasks
    if tasks is not None and all(mean is not None for of_side in means for mean in of_side):
        label = f"mean of {len(tasks.protocol['tasks'])} tasks, %\n(higher is better)"
        percent = [100 * fmean(mean for mean in of_side if mean is not None) for of_side in means]
        panels.append(lambda axis: _by_size(axis, comparison, percent, label, log=False))
    return panels


def _other_panels(comparison: Comparison) -> list[Panel]:
    sides, panels = comparison.sides, []
    if _scored(comparison):
        panels.append(lambda axis: _tasks(axis, comparison))
    if any(side.kept for side in sides):
        panels.append(lambda axis: _kept(axis, comparison))
    if comparison.timings:
        panels.append(lambda axis: _speed(axis, comparison))
    if all(side.by_position is not None for side in sides):
        panels.append(lambda axis: _positions(axis, comparison))
    return panels


def _by_size(axis: Any, comparison: Comparison, values: Sequence[float], label: str, *, log: bool) -> None:
    """A point for every model against its size. No line: what one leads to is not what another is."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    base = comparison.sides[0].parameters
    for index, (side, value) in enumerate(zip(comparison.sides, values)):
        share = 100 * side.mean(lambda run: run.parameters) / base
        axis.plot([share], [value], label=side.name, linestyle="none", **series_style(index))
    axis.set_xlabel(f"parameters, % of {comparison.sides[0].name}")
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    axis.margins(0.12)
    axis.set_ylabel(label)
    if log:
        axis.set_yscale("log")
        _plain_ticks(axis, values)


def _scored(comparison: Comparison) -> dict[str, str]:
    """The tasks of which all models have a share of right answers, and its metric. A task with a score of another
    kind, such as ROUGE, has no bar: one of zero would be wrong."""
    scores = [side.tasks.scores if side.tasks else {} for side in comparison.sides]
    metrics = {task: metric_of(values) for task, values in scores[0].items()}
    return {
        task: metric
        for task, metric in metrics.items()
        if metric and all(metric in of_side.get(task, {}) for of_side in scores)
    }


def _tasks(axis: Any, comparison: Comparison) -> None:
    """Bars per task, one per model, with the standard error of the score, or the standard deviation over its runs."""
    metrics = _scored(comparison)
    several = any(side.repeats for side in comparison.sides)
    groups = []
    for side in comparison.sides:
        spreads = [
            spread_of(
                [run.tasks and run.tasks.scores[task].get(metric) for run in side.runs],
                [run.tasks and run.tasks.scores[task].get(f"{metric}_stderr", 0.0) for run in side.runs],
            )
            for task, metric in metrics.items()
        ]
        values = [100 * spread.mean if spread else 0.0 for spread in spreads]
        errors = [100 * ((one.deviation if several else one.stderr) or 0.0) if one else 0.0 for one in spreads]
        groups.append((side.name, values, errors))
    _bars(axis, list(metrics), groups)
    axis.set_ylabel(f"score, % (with its {'standard deviation over runs' if several else 'standard error'})")


def _speed(axis: Any, comparison: Comparison) -> None:
    """Prefill and decode of every model in per cent of the base's, by batch size."""
    assert comparison.timings is not None
    batches = comparison.wanted.batches
    kinds = [(kind, batch) for batch in batches for kind in ("prefill", "decode")]
    names = [f"{kind},\nbatch {batch}" for kind, batch in kinds]
    rows = {batch: [row for row in comparison.timings.rows if row.batch == batch] for batch in batches}
    groups = []
    for index, side in enumerate(comparison.sides):
        ratios = [getattr(rows[batch][index], kind) / getattr(rows[batch][0], kind) for kind, batch in kinds]
        groups.append((side.name, [100 * ratio for ratio in ratios], None))
    _bars(axis, names, groups)
    axis.set_ylabel(f"tokens per second,\n% of {comparison.sides[0].name}")


def _bars(axis: Any, names: Sequence[str], groups: Sequence[tuple[str, list[float], list[float] | None]]) -> None:
    width = 0.8 / max(len(groups), 1)
    hatches = ("", "///", "...", "xxx", "\\\\\\", "+++")  # they tell without colour
    for index, (label, values, errors) in enumerate(groups):
        places = [number - 0.4 + width * (index + 0.5) for number in range(len(names))]
        axis.bar(
            places, values, width * 0.92, yerr=errors, label=label, color=COLORS[index % len(COLORS)],
            hatch=hatches[index % len(hatches)], edgecolor="white", linewidth=0.4, error_kw={"elinewidth": 1.0},
        )  # fmt: skip
    turned = len(names) > 4
    axis.set_xticks(range(len(names)), names, rotation=30 if turned else 0, ha="right" if turned else "center")


def _kept(axis: Any, comparison: Comparison) -> None:
    """Share of every layer's parameters that a slim model has kept."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for index, side in enumerate(comparison.sides):
        if side.kept:
            axis.plot([100 * share for share in side.kept], label=side.name, linewidth=1.4, **series_style(index, 4))
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))  # none at 92.5%, which would read 92%
    axis.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axis.set_ylabel("parameters that stay, by layer")


def _positions(axis: Any, comparison: Comparison) -> None:
    """Perplexity by position in the window."""
    every: list[float] = []
    for index, side in enumerate(comparison.sides):
        values = (side.by_position.by_position or {}) if side.by_position else {}
        every += values.values()
        axis.plot(list(values), list(values.values()), label=side.name, linewidth=1.4, **series_style(index))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_yscale("log")
    _plain_ticks(axis, every)
    axis.set_xlabel("position in the window")
    axis.set_ylabel("perplexity (lower is better)")


def _figure(columns: int = 1) -> tuple[Any, list[Any]]:
    figure, axes = new_figure(5 * columns, 3.8, columns=columns)
    for axis in axes:
        axis.grid(visible=True, alpha=0.25)
        axis.set_axisbelow(True)
    return figure, axes


def _legend(figure: Any, axis: Any) -> None:
    """Names of the models below the axes, where nothing is drawn."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 1 if max(map(len, labels), default=0) > LONG_NAME else 3
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks with plain numbers that keep apart on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    wide = bool(values) and max(values) > WIDE_RANGE * min(values)
    locator = LogLocator(subs=(1.0, 2.0, 5.0)) if wide else MaxNLocator(nbins=6, steps=[1, 2, 5, 10])
    axis.yaxis.set_major_locator(locator)
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())
