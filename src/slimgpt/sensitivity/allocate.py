"""Widths chosen by measured costs, for the budget of a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.architecture import HEADS
from slimgpt.models.parameter_counts import ModelShape, measurable
from slimgpt.planning.allocation import Sensitivity, allocate_budget, interpolate, trial_plan
from slimgpt.planning.budget import Budget
from slimgpt.planning.few_widths import in_few_widths
from slimgpt.planning.plan import Plan
from slimgpt.runtime.setting_relations import given_whole_experts
from slimgpt.sensitivity.attention_plans import plans_without_attention
from slimgpt.sensitivity.equal_layers import equal_candidates
from slimgpt.sensitivity.measure import (
    ENDPOINT,
    MIDPOINT,
    SIMPSON,
    OnMeasured,
    Points,
    _passes,
    measure,
)
from slimgpt.sensitivity.windows import FIT_PER_COLUMN, most_ranks, split_windows


def allocate(
    plan: Plan,
    shape: ModelShape,
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    config: PruneConfig,
    run: ExecutionContext,
    *,
    on_measured: OnMeasured | None = None,
    budget: Budget | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of least measured cost that removes as much as ``plan``, and its entry in the report.

    ``sensitivity`` measures one trial plan. ``search`` uses more quadrature nodes, then measures the given and the
    allocated plan and takes the one of lower divergence. (Repeated measuring and allocating gave no better plan;
    docs/lab-notes.md.) Equal layers get the cheapest pair of heads and channels; others that cost nearly as little are
    measured, too, and the one of lowest divergence is taken.

    Processes beyond the number of windows do not take part; what they get is the given plan.

    Args:
        budget: what is to be removed, if it is not parameters.

    Raises:
        NumericalError: see :func:`measure`.
    """
    start = time.perf_counter()
    run = replace(run, ranks=run.ranks.first(most_ranks(windows, shape.widest)))
    if not run.ranks.member:
        return plan, {}
    heads = config.kv_cache is None
    first, *others = nodes = quadrature(config)
    may_go = [i for i, layer in enumerate(shape.layers) if layer.attention_parameters and config.drop_attention]
    steps, count = (sum(_passes(points) for points in nodes) + bool(may_go)) * len(plan.layers), 0

    def on_step(_number: int, _steps: int, seconds: float) -> None:
        nonlocal count
        if on_measured:
            on_measured(count, steps, seconds)
        count += 1

    def measure_plan(widths: Plan, points: Points, whole_attention: Sequence[int] = ()) -> Sensitivity:
        return measure(
            model,
            load_layer,
            windows,
            widths,
            config,
            run,
            on_step,
            points=points,
            whole_attention=whole_attention,
        )

    costs = measure_plan(trial_plan(plan, shape, heads), first, may_go)
    info = {"by": "search" if config.allocation == "search" else "sensitivity", **costs.to_json()}
    chosen, candidates, pairs = allocated(plan, shape, costs.without_attention(), config, model.config, budget=budget)
    info |= pairs
    if config.drop_attention and config.allocation != "search":
        candidates = [chosen]
    if may_go:

        def cheapest(widths: Plan, measured: Sensitivity) -> Plan:
            return allocated(widths, shape, measured, config, model.config, budget=budget)[0]

        fewer = plans_without_attention(plan, shape, costs, cheapest, model.config, config.cache_target)
        candidates += [widths for widths in fewer if widths != chosen]
    if others and len(candidates) > 1:
        tried = [measure_plan(widths, points).divergence for widths, points in zip(candidates, others)]
        info["tried"], info["divergence"] = tried, min(tried)
        if may_go:
            info["tried_without_attention"] = [_without_attention(widths) for widths in candidates]
        chosen = candidates[tried.index(min(tried))]
    return chosen, {**info, "seconds": time.perf_counter() - start}


def allocated(
    plan: Plan,
    shape: ModelShape,
    costs: Sensitivity,
    config: PruneConfig,
    model_config: PreTrainedConfig,
    *,
    budget: Budget | None = None,
) -> tuple[Plan, list[Plan], dict[str, Any]]:
    """The plan of given costs that removes as much as ``plan``, those that a search or equal layers choose among, and
    what a report says of pairs of equal widths.

    Args:
        model_config: of the dense model.
        budget: what is to be removed, if it is not parameters.
    """
    if config.uniform:
        candidates, pairs = equal_candidates(plan, shape, costs, config, model_config, budget=budget)
        return candidates[0], candidates, pairs
    cheapest = allocate_budget(plan, shape, costs, plan.round_to, heads=config.kv_cache is None, budget=budget)
    # The more is removed, the more it costs to overfit the measured costs.
    chosen = interpolate(plan, cheapest, shape, 1 - plan.achieved, plan.round_to, budget=budget)
    chosen = in_few_widths(chosen, shape, config.num_widths, costs, budget=budget, heads=config.kv_cache is None)
    return chosen, [plan, chosen], {}


def _without_attention(plan: Plan) -> list[int]:
    return [index for index, sizes in enumerate(plan.layers) if not sizes[HEADS]]


def quadrature(config: PruneConfig) -> list[Points]:
    """Quadrature used for each evaluated plan: the trial plan needs gradients; the candidate plans of a search, and of
    equal layers if more than one is worth a trial, only their KL."""
    search = config.allocation == "search"
    tried = 2 if search or config.uniform else 1 if config.drop_attention else 0
    return [SIMPSON if search else MIDPOINT] + [ENDPOINT] * (tried + 2 * config.drop_attention)


def uses_sensitivity(config: PruneConfig, shape: ModelShape, windows: Tensor) -> bool:
    """Whether widths are chosen by measurement.

    ``auto`` measures if enough tokens are left for the trial run beside those of the comparison: with fewer, the trial
    overfits its windows.
    """
    if config.allocation == "schedule" or ((given_whole_experts(config) or config.uniform) and not measurable(shape)):
        return False  # the split between whole experts and channels is given; equal mixtures follow the schedule
    return enough_text(config, shape, windows)


def enough_text(config: PruneConfig, shape: ModelShape, windows: Tensor) -> bool:
    """Whether there are enough tokens for a trial run, or it is asked for all the same."""
    return (
        config.allocation != "auto" or split_windows(windows, shape.widest)[0].numel() >= FIT_PER_COLUMN * shape.widest
    )
