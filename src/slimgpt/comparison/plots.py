"""Quality against size, and what else a page shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgpt.comparison.compare import Comparison

COLORS = ("#1f6feb", "#d9730d", "#2f9e6e", "#a44cc4", "#c2255c", "#6b7280")
MARKERS = ("o", "s", "^", "D", "v", "P")


def quality_figure(found: Comparison) -> Any:
    """Perplexity, and the mean of the tasks where there is one, against parameters."""
    from matplotlib.figure import Figure  # takes a while to import

    tasks = all(side.tasks is not None and side.tasks.mean is not None for side in found.sides)
    figure = Figure(figsize=(9 if tasks else 6, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if tasks else 1, squeeze=False)[0]
    size = [side.parameters / 1e6 for side in found.sides]
    for index, (text, one) in enumerate(found.sides[0].perplexities):
        values = [side.perplexities[index][1].perplexity for side in found.sides]
        label = f"{Path(text).name}, window {one.window}"
        _line(axes[0], size, values, index, label)
    axes[0].set_ylabel("perplexity (lower is better)")
    axes[0].set_yscale("log")
    _plain_ticks(axes[0])
    if tasks:
        means = [100 * side.tasks.mean for side in found.sides if side.tasks and side.tasks.mean is not None]
        _line(axes[1], size, means, 0, f"mean of {len(found.sides[0].tasks.protocol['tasks'])} tasks")  # type: ignore[union-attr]
        axes[1].set_ylabel("accuracy, % (higher is better)")
    for axis in axes:
        axis.set_xlabel("parameters, millions")
        _names(axis, found, size)
    return figure


def position_figure(found: Comparison) -> Any | None:
    """Perplexity by position in the window; ``None`` if it was not measured."""
    from matplotlib.figure import Figure

    if any(side.by_position is None for side in found.sides):
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, side in enumerate(found.sides):
        values = (side.by_position.by_position or {}) if side.by_position else {}
        _line(axis, list(values), list(values.values()), index, side.name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _plain_ticks(axis)
    axis.set_xlabel("position in the window")
    axis.set_ylabel("perplexity (lower is better)")
    axis.legend(frameon=False)
    return figure


def plot_quality(found: Comparison, file: Path) -> None:
    """Write the picture as a PNG or SVG by the file's suffix."""
    quality_figure(found).savefig(file, dpi=130)


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


def _names(axis: Any, found: Comparison, size: list[float]) -> None:
    """The models' names along the top."""
    upper = axis.secondary_xaxis("top")
    upper.set_xticks(size, [side.name for side in found.sides], rotation=20, ha="left", fontsize=8)
    upper.tick_params(length=0)
    upper.spines["top"].set_visible(False)
