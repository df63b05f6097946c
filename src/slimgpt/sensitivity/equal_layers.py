"""Equal layers whose heads and channels are divided by measured costs."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.config import PruneConfig
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.alignment import EQUAL_TOLERANCE
from slimgpt.planning.allocation import Sensitivity
from slimgpt.planning.budget import Budget
from slimgpt.planning.equal_widths import equal_pairs, plan_of_pair
from slimgpt.planning.plan import Plan, head_units
from slimgpt.runtime.thresholds import thresholds

TRIED = 2
"""How many pairs are measured at most."""


def equal_candidates(
    plan: Plan,
    shape: ModelShape,
    costs: Sensitivity,
    config: PruneConfig,
    model_config: PreTrainedConfig,
    *,
    budget: Budget | None = None,
) -> tuple[list[Plan], dict[str, Any]]:
    """The plans of equal layers that are worth a trial, the cheapest first, and the curve for the report.

    Pairs that no stock class can hold are left out; where none is left, the given plan is the only one.

    Args:
        plan: the plan without measuring: the target, the unit of heads, and the step of FFN widths.
        costs: of heads and channels in all layers.
        model_config: of the dense model.
        budget: what is to be removed, if it is not parameters.
    """
    first = shape.layers[0]
    units = head_units(first.sizes, plan.head_unit)
    fixed = config.kv_cache is not None or plan.head_unit not in first.unit_parameters
    heads = [head_units(plan.layers[0], plan.head_unit)] if fixed else range(units, 0, -1)
    limited = config.param_limit is not None or config.byte_limit is not None or budget is not None
    pairs = equal_pairs(plan, shape, costs, heads, exceeding=limited, budget=budget)
    plans = ((pair, plan_of_pair(plan, shape, pair)) for pair in pairs)
    held = (each for each in plans if stock_config(model_config, each[1].layers[0]) is not None)
    best = list(islice(held, TRIED))
    most = thresholds().equal_cost_ratio
    near = [
        widths
        for pair, widths in best
        if pair.cost <= most * best[0][0].cost and pair.error <= max(EQUAL_TOLERANCE, best[0][0].error)
    ]
    return near or [plan], {"pairs": [asdict(pair) for pair in pairs]}
