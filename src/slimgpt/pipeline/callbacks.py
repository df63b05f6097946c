"""Callbacks of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from slimgpt.distillation.data import OnRehearsed
from slimgpt.distillation.trainer import OnDistilled
from slimgpt.planning.plan import Plan
from slimgpt.pruning.report import LayerReport
from slimgpt.runtime.memory import Placement
from slimgpt.sensitivity.measure import OnMeasured

WRITING = "writing text"
"""Name of the phase, as the callback of the steps beside measuring, pruning and training is told of it."""

OnLayer = Callable[[LayerReport, Plan], None]
"""Called after every layer, with what was done to it and the whole plan."""

OnStart = Callable[[Placement, int], None]
"""Called before the first layer, with where activations are kept and the number of layers that are finished."""

OnCompared = Callable[[int, int, float], None]
"""Called after every step of the comparison with the dense model, with its number, that of all steps, and seconds."""

OnPhase = Callable[[str, int, int, float, LayerReport | float | None], None]
"""Called after every step of every phase with the phase, the steps done and in all, the seconds it took, and what is
known of it: a layer's report, or the divergence per token of the training."""


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run; ``None`` is not called.

    Args:
        start: before the first layer.
        layer: after every layer.
        measured: after every step of measuring.
        prepare_step: after every step of timing, where a speed is asked for, of writing calibration text or other text,
            and of the dense model's pass over it.
        distilled: after every step of the training.
        compared: after every step of the comparison with the dense model, with its number, the number of all steps and
            the seconds it took.
    """

    layer: OnLayer | None = None
    measured: OnMeasured | None = None
    distilled: OnDistilled | None = None
    prepare_step: OnRehearsed | None = None
    start: OnStart | None = None
    compared: OnCompared | None = None


def by_phase(step: OnPhase) -> Callbacks:
    """The callbacks of a run whose steps are all told in one way."""

    def layer(report: LayerReport, plan: Plan) -> None:
        step("pruning", report.layer + 1, len(plan.layers), sum(report.seconds.values()), report)

    def measured(number: int, steps: int, seconds: float) -> None:
        step("measuring", number + 1, steps, seconds, None)

    def distilled(number: int, steps: int, divergence: float, seconds: float) -> None:
        step("training", number + 1, steps, seconds, divergence)

    def prepare_step(phase: str, number: int, steps: int, seconds: float) -> None:
        step(phase, number + 1, steps, seconds, None)

    def compared(number: int, steps: int, seconds: float) -> None:
        step("comparing", number + 1, steps, seconds, None)

    return Callbacks(layer, measured, distilled, prepare_step, compared=compared)


def phase_bars() -> OnPhase:
    """A bar of tqdm for every phase: on a terminal as in a notebook."""
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def step(phase: str, done: int, total: int, _seconds: float, detail: LayerReport | float | None) -> None:
        if phase not in bars:
            bars[phase] = tqdm(total=total, desc=phase)
        bar = bars[phase]
        if isinstance(detail, float):
            bar.set_postfix_str(f"KL {detail:.3f} nats", refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return step


def with_bars(callbacks: Callbacks) -> Callbacks:
    """The same callbacks, with the bars of :func:`phase_bars`."""
    shown = by_phase(phase_bars())
    names = ("layer", "measured", "distilled", "prepare_step", "compared")
    return replace(callbacks, **{name: _both(getattr(shown, name), getattr(callbacks, name)) for name in names})


def _both(first: Callable[..., None], second: Callable[..., None] | None) -> Callable[..., None]:
    """One call of two callbacks, of which the second may not be there."""

    def called(*values: Any) -> None:
        first(*values)
        if second is not None:
            second(*values)

    return called
