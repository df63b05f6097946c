"""Colours, markers, line styles and axes of all plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#1f6feb", "#d9730d", "#2f9e6e", "#a44cc4", "#c2255c", "#6b7280")
"""Of the series of a plot, in their order."""

BLUE, ORANGE, GREEN, _, _, GREY = COLORS
PALE = "#d0d5dd"
"""Of what only stands behind a series."""

DARK_COLORS = ("#58a6ff", "#f0883e", "#3fb68b", "#c586e0", "#f06595", "#9ca3af")
"""The same on a dark page."""

MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":")


def series_style(index: int, size: float = 7) -> dict[str, Any]:
    """Colour and marker of a series, so that each tells without the other; keywords of ``Axes.plot``.

    Args:
        index: of the series in its plot, from 0.
        size: of the marker, in points.
    """
    turn = index // len(COLORS)  # the seventh series has the first one's colour and another marker
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[(index + turn) % len(MARKERS)], "markersize": size}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row, without frames; axes above each other share their abscissa.

    Args:
        width: in inches.
        height: in inches.
    """
    from slimgpt.io.notebook_figure import NotebookFigure  # matplotlib takes a while to import

    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex="col").ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
