"""From a target in speed to a plan, by a table of times."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from slimgpt.config import PruneConfig
from slimgpt.errors import PlanError
from slimgpt.models.lookup import lookup
from slimgpt.models.parameter_counts import ModelShape, measurable
from slimgpt.planning.alignment import aligned_plan
from slimgpt.planning.budget import removed_by
from slimgpt.planning.few_widths import in_few_widths
from slimgpt.planning.plan import Plan
from slimgpt.planning.planner import check_heads, head_unit_of, make_plan, natural_unit
from slimgpt.planning.speed_table import NANOSECONDS, SpeedTarget

RATIOS = tuple(number / 50 for number in range(1, 50))
"""The ratios that are tried; the smallest that is fast enough is then made smaller."""

HALVINGS = 10
"""So often the step between two of them is halved."""


def chosen_head_unit(config: PruneConfig, shape: ModelShape) -> str:
    """The unit by which heads are removed: as the settings say, as the method does, or the finest way the model has."""
    head_unit = head_unit_of(config)
    return natural_unit(shape) if head_unit == "auto" else head_unit


def check_timeable(model_config: Any, shape: ModelShape) -> None:
    """Refuse a target in speed where the time of a layer is no matter of heads and channels alone.

    Raises:
        PlanError: a mixture of experts, or layers that read keys and values of others.
    """
    architecture = lookup(model_config)
    if architecture is not None and architecture.shares is not None:
        raise PlanError(
            "speedup: its last layers attend to keys and values of earlier ones, so that no layer runs, and is timed, "
            "without the others; give a ratio"
        )
    if not measurable(shape):
        raise PlanError(
            "speedup: which experts a token goes to decides the time of a mixture of experts, and no table of widths "
            "says it; give a ratio"
        )


def plan_for_speed(model_config: Any, config: PruneConfig, shape: ModelShape, target: SpeedTarget) -> Plan:
    """The plan of the schedule that is as fast as asked for by the table, and hardly faster.

    Where the schedule allows no such plan and none was named, all layers lose the same share.

    Raises:
        PlanError: no widths are as fast; with the largest speed-up that some have.
    """
    check_timeable(model_config, shape)
    check_heads(model_config, shape, config.head_unit)
    budget = target.budget(shape)
    head_unit = head_unit_of(config)
    schedules = [config.schedule] if config.schedule is not None or config.uniform else [None, "uniform"]
    fastest, refused = 1.0, PlanError("")

    def plan_of(ratio: float, schedule: str | tuple[float, ...] | None, round_to: int) -> Plan | None:
        nonlocal fastest, refused
        try:
            plan = make_plan(model_config, ratio, schedule, head_unit, round_to, config.uniform, shape=shape)
            plan = in_few_widths(plan, shape, config.num_widths)
        except PlanError as error:
            refused = error
            return None
        fastest = max(fastest, target.promised(shape, plan.layers))
        return plan

    def make(round_to: int) -> Plan:
        for schedule in schedules:
            plan = smallest_plan(
                lambda ratio, schedule=schedule: plan_of(ratio, schedule, round_to),
                lambda plan: removed_by(budget, plan.layers) >= budget.target,
            )
            if plan is not None:
                return replace(plan, ratio=plan.achieved)
        if fastest == 1.0 and refused.args[0]:
            raise refused
        seconds = target.table.model_seconds([layer.sizes for layer in shape.layers])
        raise PlanError(
            f"a speedup of {target.speedup:g} cannot be reached: the largest is {math.floor(100 * fastest) / 100:g} "
            f"({1 - budget.total / NANOSECONDS / seconds:.0%} of the time is spent around the layers); ask for less"
        )

    return aligned_plan(
        make, config, shape, lambda plan: (removed_by(budget, plan.layers) - budget.target) / budget.total
    )


def smallest_plan(plan_of: Callable[[float], Plan | None], enough: Callable[[Plan], bool]) -> Plan | None:
    """The plan of the smallest ratio that is enough, to a fraction of a step of :data:`RATIOS`; ``None`` if none is.

    Args:
        plan_of: the plan of a ratio, or ``None`` where there is none.
        enough: whether a plan removes enough.
    """
    low = 0.0
    for high in RATIOS:
        best = plan_of(high)
        if best is None or not enough(best):
            low = high
            continue
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            plan = plan_of(middle)
            if plan is not None and enough(plan):
                high, best = middle, plan
            else:
                low = middle
        return best
    return None
