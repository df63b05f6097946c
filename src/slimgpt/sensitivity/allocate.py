"""Widths chosen by measured costs, for as much as a plan removes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.parameter_counts import ModelShape, measurable
from slimgpt.planning.allocation import Sensitivity, allocate_budget, interpolate, trial_plan
from slimgpt.planning.plan import Plan
from slimgpt.sensitivity.measure import (
    ENDPOINT,
    FIT_PER_COLUMN,
    PARTS,
    SIMPSON,
    OnMeasured,
    Points,
    _passes,
    divide,
    measure,
)


def allocate(
    plan: Plan,
    shape: ModelShape,
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    config: PruneConfig,
    run: ExecutionContext,
    on_measured: OnMeasured | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """A plan that removes as much as ``plan`` does, where it costs least by measurement, and what a report says of it.

    ``sensitivity`` measures one trial plan and spends by what it shows. ``search`` measures at more points of the path,
    then looks at both plans and takes the one whose predictions diverge less. (To measure what was spent, and to spend
    again, gave no better plan; docs/lab-notes.md.)

    Raises:
        NumericalError: see :func:`measure`.
    """
    start = time.perf_counter()
    heads = config.kv_cache is None
    first, *others = every = quadrature(config)
    steps, count = sum(_passes(points) for points in every) * len(plan.layers), 0

    def on_step(_number: int, _steps: int, seconds: float) -> None:
        nonlocal count
        if on_measured:
            on_measured(count, steps, seconds)
        count += 1

    def look_at(widths: Plan, points: Points) -> Sensitivity:
        return measure(model, load_layer, windows, widths, config, run, on_step, points)

    costs = look_at(trial_plan(plan, shape, heads), first)
    cheapest = allocate_budget(plan, shape, costs, config.round_to, heads)
    # The more is removed, the more it costs to follow what is measured into extremes.
    chosen = interpolate(plan, cheapest, shape, 1 - plan.achieved, config.round_to)
    said = {"by": "search" if others else "sensitivity", **costs.to_json()}
    if others:
        tried = [(look_at(widths, points).divergence, widths) for widths, points in zip((plan, chosen), others)]
        said["tried"] = [divergence for divergence, _ in tried]
        said["divergence"], chosen = min(tried, key=lambda pair: pair[0])
    return chosen, {**said, "seconds": time.perf_counter() - start}


def quadrature(config: PruneConfig) -> list[Points]:
    """What is measured of every plan that is looked at: of a trial the parts; in a search, of the plan given and of
    the one spent, the whole."""
    return [SIMPSON, ENDPOINT, ENDPOINT] if config.allocation == "search" else [PARTS]


def uses_sensitivity(config: PruneConfig, shape: ModelShape, windows: Tensor) -> bool:
    """Whether widths are chosen by measurement.

    ``auto`` measures where enough tokens are left for the trial run beside those whose predictions are compared: with
    fewer, the trial fits its own windows and says little of any others.
    """
    if config.allocation == "schedule" or not measurable(shape):
        return False
    return config.allocation != "auto" or divide(windows, shape.widest)[0].numel() >= FIT_PER_COLUMN * shape.widest
