"""Who is told of a run's progress."""

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
"""What is done, as the callback of steps before the training is told of it."""

OnLayer = Callable[[LayerReport, Plan], None]
"""Called after every layer, with what was done to it and the whole plan."""

OnStart = Callable[[Placement, int], None]
"""Called before the first layer, with where activations are kept and the number of layers that are finished."""


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run; ``None`` is not called.

    Args:
        start: before the first layer.
        layer: after every layer.
        measured: after every step of measuring.
        prepare_step: after every step of writing calibration text or other text, and of the dense model's pass over it.
        distilled: after every step of the training.
    """

    layer: OnLayer | None = None
    measured: OnMeasured | None = None
    distilled: OnDistilled | None = None
    prepare_step: OnRehearsed | None = None
    start: OnStart | None = None


def with_bars(callbacks: Callbacks) -> Callbacks:
    """The same callbacks, with a bar of tqdm for every phase: on a terminal as in a notebook."""
    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def step(phase: str, done: int, total: int, state: str = "") -> None:
        if phase not in bars:
            bars[phase] = tqdm(total=total, desc=phase)
        bar = bars[phase]
        bar.set_postfix_str(state, refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    def layer(report: LayerReport, plan: Plan) -> None:
        step("pruning", report.layer + 1, len(plan.layers))
        if callbacks.layer:
            callbacks.layer(report, plan)

    def measured(number: int, steps: int, seconds: float) -> None:
        step("measuring", number + 1, steps)
        if callbacks.measured:
            callbacks.measured(number, steps, seconds)

    def distilled(number: int, steps: int, divergence: float, seconds: float) -> None:
        step("training", number + 1, steps, f"KL {divergence:.3f} nats")
        if callbacks.distilled:
            callbacks.distilled(number, steps, divergence, seconds)

    def prepare_step(phase: str, number: int, steps: int, seconds: float) -> None:
        step(phase, number + 1, steps)
        if callbacks.prepare_step:
            callbacks.prepare_step(phase, number, steps, seconds)

    return replace(callbacks, layer=layer, measured=measured, distilled=distilled, prepare_step=prepare_step)
