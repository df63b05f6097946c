"""The widths of every layer as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slimgpt.io.plotting import BLUE, ORANGE, PALE, new_figure
from slimgpt.models.architecture import CHANNELS, HEADS, Sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_widths(dense: Sequence[Sizes], slim: Sequence[Sizes], file: Path) -> None:
    """Save :func:`widths_figure` as a PNG or SVG, by the file's suffix."""
    widths_figure(dense, slim).savefig(file, dpi=120)


def widths_figure(dense: Sequence[Sizes], slim: Sequence[Sizes]) -> Figure:
    """Query heads and FFN channels per layer, before (grey) and after."""
    from matplotlib.ticker import MaxNLocator  # takes a while to import, and most commands draw nothing

    figure, (upper, lower) = new_figure(9, 5, rows=2)
    layers = range(len(slim))
    for axes, field, label, color in (
        (upper, HEADS, "attention heads", ORANGE),
        (lower, CHANNELS, "FFN channels", BLUE),
    ):
        axes.bar(layers, [sizes[field] for sizes in dense], color=PALE, width=0.86, label="removed")
        axes.bar(layers, [sizes[field] for sizes in slim], color=color, width=0.86, label="kept")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)  # covers no bar
    lower.set_xlabel("layer")
    lower.set_xlim(-0.6, len(slim) - 0.4)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no layer 0.5
    figure.suptitle("Width of every decoder layer")
    return figure
