"""The two plots of the page: perplexity against the share removed, and against the cost of pruning.

python -m quality_table.plots results/quality.json   # in benchmarks: draw them again from the rows of a page
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_table.models import MODELS
from quality_table.rows import DENSE, Result, Row
from quality_table.run import TEXTS, VALIDATION

Rows = Sequence[tuple[Row, Result]]

CUT = 30
"""The plots end at so many times the dense model's perplexity."""

NAMES = {"wikitext2": "WikiText-2", "c4": "C4"}
LABELS = {
    "slimgpt": "slimgpt, the default",
    "slimgpt-search": "slimgpt, --allocation search",
    "paper": "SlimGPT, as published",
    "flap": "FLAP",
    "llm-pruner": "LLM-Pruner",
    "shortgpt": "ShortGPT",
    "obs-uniform": "OBS, uniform",
    "wanda": "Wanda",
    "magnitude": "magnitude",
}
STYLES = (
    ("#d9730d", "o"), ("#8a5a00", "*"), ("#1f6feb", "s"), ("#a44cc4", "^"), ("#7a4a2b", "D"), ("#6b7280", "v"),
    ("#c2255c", "P"), ("#2f9e6e", "X"), ("#111827", "d"),
)  # fmt: skip
"""Colour and marker, in the order of :data:`LABELS`: they can be told apart without colour."""


def plot_ratio(rows: Rows, validation: bool, file: Path) -> None:
    """Perplexity against the share removed, one panel per model and text."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    models = list(dict.fromkeys(row.model for row, result in rows if result.measures))
    measures = TEXTS[1:]
    figure = Figure(figsize=(5 * len(models), 3.6 * len(measures) + 1), layout="constrained")
    axes = figure.subplots(len(measures), len(models), squeeze=False)
    for column, model in enumerate(models):
        for line, (text, window) in enumerate(measures):
            axis, measure = axes[line][column], measure_name(text, window, validation)
            series: dict[str, list[tuple[float, float]]] = {}
            for row, result in rows:
                value = result.value(measure)
                if row.model == model and not row.repair and value is not None:
                    series.setdefault(row.method, []).append((100 * result.found["achieved"], value))
            dense = series.pop(DENSE, [])
            for method in sorted(series, key=_place):
                x, y = zip(*sorted(dense + series[method]))
                axis.plot(x, y, label=LABELS.get(method, method), **_style(method), **_weight(method))
            axis.set(yscale="log", ylabel=f"perplexity, {NAMES.get(text, text)}, window {window}")
            axis.xaxis.set_major_formatter(PercentFormatter(decimals=0))
            if dense:
                axis.set_ylim(top=min(axis.get_ylim()[1], CUT * dense[0][1]))
            _finish(axis, model if line == 0 else None)
            if line == len(measures) - 1:
                axis.set_xlabel("parameters of the decoder layers removed")
    _save(figure, file)


def plot_seconds(rows: Rows, validation: bool, file: Path) -> None:
    """Perplexity against core-minutes, one panel per model and ratio."""
    from matplotlib.figure import Figure

    text, window = TEXTS[1]
    measure = measure_name(text, window, validation)
    pruned = [(row, result) for row, result in rows if row.method != DENSE and not row.repair and result.measures]
    models, ratios = (list(dict.fromkeys(items)) for items in zip(*((row.model, row.ratio) for row, _ in pruned)))
    figure = Figure(figsize=(5 * len(models), 3 * len(ratios) + 1), layout="constrained")
    axes = figure.subplots(len(ratios), len(models), squeeze=False, sharex=True)
    for column, model in enumerate(models):
        dense = next((result.value(measure) for row, result in rows if (row.model, row.method) == (model, DENSE)), None)
        limit = CUT * (dense or math.inf)
        for line, ratio in enumerate(ratios):
            axis = axes[line][column]
            points = [
                (row.method, result.found.get("core_seconds"), result.value(measure))
                for row, result in pruned
                if (row.model, row.ratio) == (model, ratio)
            ]
            points = [(method, x / 60, y) for method, x, y in points if x is not None and y is not None]
            top = min(max((y for *_, y in points), default=1.0), limit)
            for method, x, y in sorted(points, key=lambda point: _place(point[0])):
                # What is off the plot is hollow and stands at its upper edge.
                hollow = {"markerfacecolor": "none"} if y > top else {}
                label = LABELS.get(method, method)
                axis.plot([x], [min(y, top)], linestyle="none", label=label, **_style(method, 7), **hollow)
            axis.set(xscale="log", yscale="log", ylabel=f"perplexity, {NAMES.get(text, text)}")
            axis.margins(0.15)
            _plain_ticks(axis.xaxis, (1, 3))
            _finish(axis, model if line == 0 else None)
            axis.text(0.98, 0.95, f"{ratio:.0%} removed", transform=axis.transAxes, ha="right", va="top", weight="bold")
    for axis in axes[-1]:
        axis.set_xlabel("core-minutes of pruning")
    _save(figure, file)


def measure_name(text: str, window: int, validation: bool) -> str:
    """The key of a perplexity in a row's measures."""
    return f"{text}{VALIDATION if validation else ''}@{window}"


def _finish(axis: Any, model: str | None) -> None:
    """Ticks, grid, and the model above the first panel of a column."""
    _plain_ticks(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if model is not None:
        axis.set_title(MODELS[model].title, fontsize=11)


def _save(figure: Any, file: Path) -> None:
    """Write a plot with one legend for all panels, in as few bytes as a palette needs."""
    from PIL import Image

    labelled: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels):
            if label not in labelled or handle.get_markerfacecolor() != "none":
                labelled.setdefault(label, handle)
    order = [label for label in (*LABELS.values(), *labelled) if label in labelled]
    if labelled:
        figure.legend(
            [labelled[label] for label in dict.fromkeys(order)], dict.fromkeys(order),
            loc="outside lower center", ncols=3, frameon=False,
        )  # fmt: skip
    figure.savefig(file, dpi=110)
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


def _place(method: str) -> int:
    names = list(LABELS)
    return names.index(method) if method in names else len(names)


def _style(method: str, size: float = 5.5) -> dict[str, Any]:
    colour, marker = STYLES[_place(method) % len(STYLES)]
    return {"color": colour, "marker": marker, "markersize": size + 2 * (marker == "*")}


def _weight(method: str) -> dict[str, Any]:
    return {"linewidth": 2.5, "zorder": 3} if method.startswith("slimgpt") else {"linewidth": 1.2, "linestyle": "--"}


def _plain_ticks(axis: Any, digits: Sequence[float] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """Numbers as people write them, along one axis of a plot."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def redraw(data: Path) -> None:
    """Draw the plots again from the JSON file of a page."""
    content = json.loads(data.read_text(encoding="utf-8"))
    results = [Result(**values) for values in content["rows"]]
    rows = [(Row(**{**result.row, "changes": tuple(map(tuple, result.row["changes"]))}), result) for result in results]
    rows = [(row, result) for row, result in rows if not row.changes and row.method in (DENSE, *LABELS)]  # no ablations
    validation = content["settings"]["validation"]
    plot_ratio(rows, validation, data.with_name(f"{data.stem}-ratio.png"))
    plot_seconds(rows, validation, data.with_name(f"{data.stem}-seconds.png"))


if __name__ == "__main__":
    redraw(Path(sys.argv[1]))
