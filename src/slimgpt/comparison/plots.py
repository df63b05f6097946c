"""Plots of a comparison: quality against size, and perplexity by position."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgpt.comparison.result import Comparison

COLORS = ("#1f6feb", "#d9730d", "#2f9e6e", "#a44cc4", "#c2255c", "#6b7280")
MARKERS = ("o", "s", "^", "D", "v", "P")


def quality_figures(comparison: Comparison) -> list[Any]:
    """Perplexity, and the mean of the tasks where there is one, against parameters."""
    figure, axis = _figure()
    _perplexity(axis, comparison)
    figures = [figure]
    if _has_tasks(comparison):
        figure, axis = _figure()
        _tasks(axis, comparison)
        figures.append(figure)
    return figures


def position_figures(comparison: Comparison) -> list[Any]:
    """Perplexity by position in the window, if it was measured."""
    if any(result.by_position is None for result in comparison.sides):
        return []
    figure, axis = _figure()
    for index, result in enumerate(comparison.sides):
        values = (result.by_position.by_position or {}) if result.by_position else {}
        _line(axis, list(values), list(values.values()), index, result.name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _plain_ticks(axis)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.set_xlabel("position in the window")
    axis.set_ylabel("perplexity (lower is better)")
    return [figure]


def plot_quality(comparison: Comparison, file: Path) -> None:
    """Write the picture as a PNG or SVG by the file's suffix."""
    figure, axes = _figure(2 if _has_tasks(comparison) else 1)
    _perplexity(axes[0] if _has_tasks(comparison) else axes, comparison)
    if _has_tasks(comparison):
        _tasks(axes[1], comparison)
    figure.savefig(file, dpi=130)


def _figure(columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # takes a while to import

    figure = Figure(figsize=(5 * columns, 3.5), layout="constrained")
    return figure, figure.subplots(1, columns)


def _has_tasks(comparison: Comparison) -> bool:
    return all(result.tasks is not None and result.tasks.mean is not None for result in comparison.sides)


def _perplexity(axis: Any, comparison: Comparison) -> None:
    for index, (text, base) in enumerate(comparison.sides[0].perplexities):
        values = [result.perplexities[index][1].perplexity for result in comparison.sides]
        _by_size(axis, comparison, values, min, index, f"{Path(text).name}, window {base.window}")
    axis.set_ylabel("perplexity (lower is better)")
    axis.set_yscale("log")
    _plain_ticks(axis)
    _names(axis, comparison)


def _tasks(axis: Any, comparison: Comparison) -> None:
    means = [100 * result.tasks.mean for result in comparison.sides if result.tasks and result.tasks.mean is not None]
    tasks = comparison.sides[0].tasks
    _by_size(axis, comparison, means, max, 0, f"mean of {len(tasks.protocol['tasks']) if tasks else 0} tasks")
    axis.set_ylabel("accuracy, % (higher is better)")
    _names(axis, comparison)


def _sizes(comparison: Comparison) -> list[float]:
    return [result.parameters / 1e6 for result in comparison.sides]


def _by_size(axis: Any, comparison: Comparison, values: list[float], best: Any, index: int, label: str) -> None:
    """A point for every model, and a line through the best of every size."""
    sizes = _sizes(comparison)
    through = [(size, best(v for s, v in zip(sizes, values) if s == size)) for size in sorted(set(sizes))]
    _line(axis, [size for size, _ in through], [value for _, value in through], index, label)
    axis.plot(sizes, values, color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)], linestyle="none")


def _line(axis: Any, x: list[float], y: list[float], index: int, label: str) -> None:
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    axis.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.8, label=label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, alpha=0.25)
    axis.legend(frameon=False)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_minor_locator(NullLocator())


def _names(axis: Any, comparison: Comparison) -> None:
    """Label the axis below with parameters and the one above with model names."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("parameters, millions")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    upper = axis.secondary_xaxis("top")
    names: dict[float, list[str]] = {}
    for size, result in zip(_sizes(comparison), comparison.sides):
        names.setdefault(size, []).append(result.name)
    labels = ["\n".join(same) for same in names.values()]
    upper.set_xticks(list(names), labels, rotation=20, ha="left", fontsize=8)
    upper.tick_params(length=0)
    upper.spines["top"].set_visible(False)
