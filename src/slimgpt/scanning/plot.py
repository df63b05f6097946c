"""Losses and speed of every size as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimgpt.io.plotting import GREEN, GREY, LINES, new_figure, series_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from slimgpt.scanning.points import ScanPoint


def scan_figure(
    points: Sequence[ScanPoint], titles: Mapping[str, str], max_kl: float, recommended: float | None
) -> Figure:
    """KL divergence, agreement of the most likely token, and speed against the share removed.

    Measured sizes have filled markers, predicted ones hollow ones.

    Args:
        titles: of the texts, by name.
        recommended: the ratio that is recommended, marked by a vertical line.
    """
    figure, (divergence, agreement, speed) = new_figure(12, 3.8, columns=3)
    for series, name in enumerate(points[0].losses):
        _line(divergence, points, [point.losses[name].kl for point in points], series, titles[name])
        _line(agreement, points, [100 * point.losses[name].same_top for point in points], series, titles[name])
    divergence.axhline(max_kl, color=GREY, linestyle=":", label=f"bound: {max_kl:g}")
    divergence.set_yscale("log")
    divergence.yaxis.set_major_formatter("{x:g}")
    divergence.yaxis.set_minor_formatter("{x:g}")
    divergence.set_ylabel("KL from the dense model, nats per token")
    agreement.set_ylabel("same most likely token, %")
    for series, (field, title) in enumerate((("prefill", "prompts"), ("decode", "new tokens"))):
        _line(speed, points, [getattr(point, field) for point in points], series, title)
    speed.set_ylabel("times as fast, by FLOPs")
    for axis in (divergence, agreement, speed):
        axis.set_xlabel("parameters of the layers removed, %")
        if recommended is not None:
            label = f"recommended: {100 * recommended:g}%"
            axis.axvline(100 * recommended, color=GREEN, linestyle="-.", label=label)
        axis.legend(fontsize="small", framealpha=0.9)
    figure.suptitle("filled: pruned and measured; hollow: predicted", fontsize="small")
    return figure


def _line(axis: Any, points: Sequence[ScanPoint], values: Sequence[float], series: int, label: str) -> None:
    style = series_style(series, size=6)
    x = [100 * point.removed for point in points]
    axis.plot(x, values, linestyle=LINES[series], markerfacecolor="white", label=label, **style)
    measured = [(at, value) for at, value, point in zip(x, values, points) if point.measured]
    axis.plot(*zip(*measured), linestyle="", **style)
