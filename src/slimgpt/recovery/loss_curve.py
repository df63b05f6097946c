"""Losses by step, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimgpt.io.plotting import BLUE, GREY, new_figure

CURVE_FILE, CURVE_PICTURE = "recovery.json", "recovery.png"


@dataclass(frozen=True)
class Curve:
    """Losses of a run.

    Args:
        training: ``(step, loss)``: what is minimised, mean per predicted token since the point before.
        held_out: ``(step, loss)``: cross-entropy on the held-out examples.
        learning_rate: ``(step, rate)``.
        steps: planned steps.
        kept: the step whose weights are saved (its key in JSON).
    """

    training: tuple[tuple[int, float], ...]
    held_out: tuple[tuple[int, float], ...]
    learning_rate: tuple[tuple[int, float], ...]
    steps: int
    kept: int

    @classmethod
    def from_history(cls, history: Sequence[dict[str, Any]], steps: int, best_step: int) -> Curve:
        """From ``log_history`` of a Trainer."""
        series = {
            name: tuple((entry["step"], float(entry[name])) for entry in history if name in entry)
            for name in ("loss", "held_out_loss", "learning_rate")
        }
        return cls(series["loss"], series["held_out_loss"], series["learning_rate"], steps, best_step)


def write_curve(folder: Path, values: dict[str, Any]) -> None:
    """Write ``recovery.json`` and ``recovery.png`` from what a recovery's ``to_json`` gave."""
    curve = Curve(**values["curve"])
    (folder / CURVE_FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    figure, (axes,) = new_figure(8, 4.5)
    if curve.training:
        axes.plot(*zip(*curve.training), color=GREY, linewidth=1, label="training")
    if curve.held_out:
        axes.plot(*zip(*curve.held_out), color=BLUE, marker="o", markersize=4, label="held out (cross-entropy)")
        axes.axvline(curve.kept, color=BLUE, linewidth=0.8, linestyle=":", label="kept")
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    axes.legend()
    figure.suptitle("Recovery")
    figure.savefig(folder / CURVE_PICTURE, dpi=120)
