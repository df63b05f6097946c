"""Who is told of a run's progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slimgpt.distillation.data import OnRehearsed
from slimgpt.distillation.trainer import OnDistilled
from slimgpt.planning.plan import Plan
from slimgpt.pruning.report import LayerReport
from slimgpt.runtime.memory import Placement
from slimgpt.sensitivity.measure import OnMeasured

WRITING = "the model writes its calibration text"
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
