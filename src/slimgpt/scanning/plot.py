"""Losses and speed of every size as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from slimgpt.scanning.points import ScanPoint

STYLES = (("#1f6feb", "o", "-"), ("#d9730d", "s", "--"))
"""Colour, marker and line of what is drawn, so that each tells without the others."""


def scan_figure(
    points: Sequence[ScanPoint], titles: Mapping[str, str], max_kl: float, recommended: float | None
) -> Figure:
    """KL divergence, agreement of the most likely token, and speed against the share removed.

    Measured sizes have filled markers, predicted ones hollow ones.

    Args:
        titles: of the texts, by name.
        recommended: the ratio that is recommended, marked by a vertical line.
    """
    from slimgpt.pruning.notebook_figure import NotebookFigure  # matplotlib takes a while to import

    figure = NotebookFigure(figsize=(12, 3.8), layout="constrained")
    divergence, agreement, speed = figure.subplots(1, 3)
    names = list(points[0].losses)
    for name, style in zip(names, STYLES):
        _line(divergence, points, [point.losses[name].kl for point in points], style, titles[name])
        _line(agreement, points, [100 * point.losses[name].same_top for point in points], style, titles[name])
    divergence.axhline(max_kl, color="#6b7280", linestyle=":", label=f"bound: {max_kl:g}")
    divergence.set_yscale("log")
    divergence.yaxis.set_major_formatter("{x:g}")
    divergence.yaxis.set_minor_formatter("{x:g}")
    divergence.set_ylabel("KL from the dense model, nats per token")
    agreement.set_ylabel("same most likely token, %")
    for field, style, title in (("prefill", STYLES[0], "prompts"), ("decode", STYLES[1], "new tokens")):
        _line(speed, points, [getattr(point, field) for point in points], style, title)
    speed.set_ylabel("times as fast, by FLOPs")
    for axis in (divergence, agreement, speed):
        axis.set_xlabel("parameters of the layers removed, %")
        axis.spines[["top", "right"]].set_visible(False)
        if recommended is not None:
            axis.axvline(
                100 * recommended, color="#2f9e6e", linestyle="-.", label=f"recommended: {100 * recommended:g}%"
            )
        axis.legend(fontsize="small", framealpha=0.9)
    figure.suptitle("filled: pruned and measured; hollow: predicted", fontsize="small")
    return figure


def _line(axis: Any, points: Sequence[ScanPoint], values: Sequence[float], style: tuple[str, ...], label: str) -> None:
    color, marker, line = style
    x = [100 * point.removed for point in points]
    axis.plot(x, values, color=color, linestyle=line, marker=marker, markerfacecolor="white", label=label)
    measured = [(at, value) for at, value, point in zip(x, values, points) if point.measured]
    axis.plot(*zip(*measured), color=color, linestyle="", marker=marker)
