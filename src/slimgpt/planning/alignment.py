"""The number that FFN widths become multiples of where none is given: as large as the model and the target allow.

Kernels, quantisation in blocks (Q8_0: 32 numbers, K-quants: 256) and shards over devices want widths that are
multiples of a power of two; a width that is not costs speed and is often left unquantised.
"""

from __future__ import annotations

from collections.abc import Callable

from slimgpt.config import PruneConfig
from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.plan import TOLERANCE, Plan
from slimgpt.runtime.setting_checks import AUTO
from slimgpt.runtime.setting_relations import cache_alone

ALIGNED = ((4096, 64), (1024, 32))
"""The narrowest FFN of a model from which on, and the step of its widths by layer; below, widths are not rounded. So a
step is at most 1/32 of a width."""

EQUAL_STEP = 64
"""The step of equal widths, which all engines want, in models whose widths by layer are rounded at all."""

EQUAL_TOLERANCE = 0.005
"""How far the achieved share of equal layers, or of layers in a few widths, may be from the one asked for before their
step is halved: many layers change together, so that steps cannot be mixed as freely."""


def preferred_step(config: PruneConfig, shape: ModelShape) -> int:
    """The step that FFN widths shall have: the one given, or by the size of the model.

    The paper's method and the other baselines remove single channels, as published.
    """
    if config.round_to != AUTO:
        return int(config.round_to)
    if config.method != "slimgpt" or config.plan is not None or cache_alone(config):
        return 1
    narrowest = min((layer.sizes[CHANNELS] for layer in shape.layers if layer.has_ffn), default=0)
    step = next((step for width, step in ALIGNED if narrowest >= width), 1)
    return EQUAL_STEP if config.uniform and step > 1 else step


def missed_share(plan: Plan) -> float:
    """By how much a plan misses the share of parameters that was asked for."""
    return abs(plan.achieved - plan.ratio)


def aligned_plan(
    make: Callable[[int], Plan], config: PruneConfig, shape: ModelShape, missed: Callable[[Plan], float] = missed_share
) -> Plan:
    """The plan of the largest step at which the target is met; a step that was given is kept.

    Args:
        make: gives the plan of a step.
        missed: gives the share of all layers by which a plan misses the target.

    Raises:
        PlanError: see :func:`slimgpt.planning.planner.make_plan`.
    """
    step, plans = preferred_step(config, shape), []
    if config.round_to != AUTO:
        return make(step)
    tolerance = EQUAL_TOLERANCE if config.uniform or config.num_widths is not None else TOLERANCE
    while True:
        try:
            plans.append(make(step))
        except PlanError:
            if step == 1 and not plans:
                raise
        else:
            if missed(plans[-1]) <= tolerance:
                return plans[-1]
        if step == 1:
            return min(plans, key=missed)  # the first, of the largest step
        step //= 2


def why_not_nearer(config: PruneConfig, shape: ModelShape, plan: Plan) -> str | None:
    """Why a plan removes another share than was asked for, or has a smaller step than is preferred; ``None`` if
    neither is so."""
    preferred = preferred_step(config, shape)
    tolerance = EQUAL_TOLERANCE if plan.round_to < preferred else TOLERANCE
    if config.speedup is None and missed_share(plan) > tolerance:
        if config.kv_cache is not None and plan.achieved > plan.ratio:
            return "the KV cache asked for takes more"
        if config.num_widths is not None:
            return f"{config.num_widths} widths in multiples of {plan.round_to} allow no nearer share; more of them do"
        if plan.round_to > 1:
            return f"widths that are multiples of {plan.round_to} allow no nearer share; a smaller --round-to does"
        if config.uniform:
            return "equal layers allow no nearer share; widths that differ by layer do"
        return "the units that can be removed allow no nearer share"
    if plan.round_to < preferred:
        return (
            f"FFN widths are multiples of {plan.round_to}: in multiples of {preferred} they would miss what is asked "
            "for by more than the tolerance"
        )
    return None
