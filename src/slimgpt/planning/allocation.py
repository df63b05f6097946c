"""Allocation of a budget: the cheapest widths that remove it, from measured costs of structures.

The costs of structures narrowed alone do not add up: heads compensate for each other, and errors of neighbouring
layers compound. So one trial plan narrows *every* structure, and its loss is attributed to the structures; from there
each structure's cost is extrapolated by a power of the share of it that is removed. In a mixture all experts of a layer
are one structure and stay; a shared expert is one of its own, or follows their width.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from slimgpt.config import PruneConfig
from slimgpt.errors import PlanError
from slimgpt.models.architecture import HEADS
from slimgpt.models.parameter_counts import LayerShape, ModelShape, measurable
from slimgpt.planning.budget import Budget, adjust_to_target, parameters_of, removed_by
from slimgpt.planning.ffn import FIELDS, free_units, nearest, step_of_unit, tied_to, widths_of
from slimgpt.planning.plan import TOLERANCE, Plan, head_units, plan_of_widths, removed_from_all, with_heads
from slimgpt.runtime.setting_relations import given_whole_experts

MAX_FFN_REMOVED, MIN_FFN_REMOVED = 0.75, 0.02
"""Largest share of a layer's FFN channels that a plan removes, and the smallest that a trial plan does."""

STEPS = 64
"""Number of candidate widths of an FFN; the remainder of the budget is met channel by channel."""

ATTENTION = "attention"
"""The unit of a layer's whole attention, all heads with the norms that serve it alone."""

POWERS = {"ffn": 1.5, "shared": 1.5, "query": 4.0, "kv": 2.2}
"""Exponents of the cost in the share that is removed, fitted on 2 models x 2 texts (docs/lab-notes.md); heads are
steeper because the remaining heads take over the removed ones' work."""

FLOOR = 0.3
"""Lower bound of a cost relative to the median of its kind: small measured costs are mostly noise, and can be
negative."""


def check_measurable(config: PruneConfig, shape: ModelShape) -> None:
    """Refuse to measure on request what the schedule decides; ``auto`` follows the schedule there.

    Raises:
        PlanError: equal layers of a mixture, or a mixture whose share of whole experts is given.
    """
    if config.allocation not in ("sensitivity", "search") or measurable(shape):
        return
    if config.uniform or given_whole_experts(config):
        option, subject = ("uniform", "equal layers") if config.uniform else ("whole_experts", "whole experts")
        raise PlanError(
            f"allocation '{config.allocation}' measures no {subject} of a mixture of experts, which follow the "
            f"schedule; leave out allocation, or {option}"
        )


@dataclass(frozen=True)
class StructureCost:
    """The contribution of one structure to the loss of a narrowed model.

    Args:
        layer: index of the layer.
        unit: ``kv``, ``query``, ``ffn`` (channels of an FFN, or of all experts), ``shared`` or ``attention``.
        removed: the share of its units that was removed, in (0, 1); 1 for a whole attention.
        cost: its part of the divergence of the model's predictions from the dense model's, in nats per token; for a
            whole attention by how much the divergence grows when what is left of it goes, too.
    """

    layer: int
    unit: str
    removed: float
    cost: float

    def at(self, share: float) -> float:
        """The extrapolated cost of removing a share."""
        return self.cost * (share / self.removed) ** POWERS[self.unit]


@dataclass(frozen=True)
class Sensitivity:
    """The loss of a narrowed model, and its attribution to structures.

    Args:
        divergence: ``KL(dense || narrowed)`` in nats per token.
        contributions: one per narrowed structure, as measured.
    """

    divergence: float
    contributions: tuple[StructureCost, ...]

    def with_floor(self) -> list[StructureCost]:
        """The contributions, with small ones raised to the :data:`FLOOR`."""
        floored = []
        for unit in sorted({c.unit for c in self.contributions} - {ATTENTION}):
            kind = [c for c in self.contributions if c.unit == unit]
            floor = max(FLOOR * statistics.median(c.cost for c in kind), 1e-9)
            floored += [StructureCost(c.layer, unit, c.removed, max(c.cost, floor)) for c in kind]
        # Measured one by one, not as parts of a sum: none is noise beside the others.
        return floored + [replace(c, cost=max(c.cost, 0.0)) for c in self.contributions if c.unit == ATTENTION]

    def without_attention(self, keep: Collection[int] = ()) -> Sensitivity:
        """The same without the costs of whole attentions, or with those of some layers alone."""
        rest = (c for c in self.contributions if c.unit != ATTENTION or c.layer in keep)
        return replace(self, contributions=tuple(rest))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def trial_plan(plan: Plan, shape: ModelShape, heads: bool = True) -> Plan:
    """A plan that removes about as much as ``plan`` does, and something of every structure of every layer.

    Args:
        heads: whether heads may be chosen; else their numbers are those of ``plan``.
    """
    target = plan.parameters_before - plan.parameters
    share = target / shape.layer_parameters
    layers = []
    for layer, sizes in zip(shape.layers, plan.layers, strict=True):
        units = head_units(layer.sizes, plan.head_unit)
        keep = max(units - max(int(share * units), 1), min(units, 1)) if heads else head_units(sizes, plan.head_unit)
        layers.append(with_heads(layer, plan.head_unit, keep, {}))
    left = target - removed_from_all(shape, layers)
    wide = sum(layer.unit_parameters[u] * layer.sizes[FIELDS[u]] for layer in shape.layers for u in free_units(layer))
    narrowed = min(max(left / max(wide, 1), MIN_FFN_REMOVED), MAX_FFN_REMOVED)
    for index, layer in enumerate(shape.layers):
        for unit in free_units(layer):
            size, step = layer.sizes[FIELDS[unit]], step_of_unit(layer, unit, 1)
            gone = max(round(narrowed * size / step), 1) * step
            layers[index][FIELDS[unit]] = max(size - gone, min(step, size))
        layers[index] = tied_to(layer, layers[index])
    return plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)


def allocate_budget(
    plan: Plan,
    shape: ModelShape,
    costs: Sensitivity,
    round_to: int = 1,
    heads: bool = True,
    *,
    budget: Budget | None = None,
) -> Plan:
    """The plan of least cost that removes as much as ``plan``.

    Every structure takes the step whose cost minus price times what it removes is the lowest, at the one price for
    which the target is met (a Lagrange multiplier). What is removed beyond the target is given back as channels.

    Args:
        plan: what is returned where nothing cheaper removes as much, and the unit of heads.
        shape: the dense model.
        costs: structures without a contribution stay as they are in the model, fixed heads as they are in ``plan``.
        round_to: every FFN width becomes a multiple of it.
        heads: whether heads may be chosen; else their numbers are those of ``plan``.
        budget: what is to be removed; as many parameters as ``plan`` removes if not given.
    """
    budget = budget or parameters_of(plan, shape)
    fixed_heads = None if heads else [head_units(sizes, plan.head_unit) for sizes in plan.layers]
    options = _options(shape, costs.with_floor(), plan.head_unit, round_to, fixed_heads, budget)
    chosen = cheapest_options(options, budget.target)
    if chosen is None:
        return plan  # the measured structures cannot remove as much
    layers = []
    for index, layer in enumerate(shape.layers):
        kept = {unit: option.keep for (at, unit), option in chosen.items() if at == index}
        ffn = {FIELDS[unit]: keep for unit, keep in kept.items() if unit in FIELDS}
        unchanged = head_units(layer.sizes, plan.head_unit) if fixed_heads is None else fixed_heads[index]
        count = kept.get(plan.head_unit, unchanged)
        layers.append(tied_to(layer, with_heads(layer, plan.head_unit, count, ffn)))
    adjust_to_target(shape, layers, round_to, budget)
    cheapest = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio, round_to=round_to)
    # Heads can be too coarse for a small budget.
    return cheapest if _within(cheapest, plan, budget) else plan


def _within(plan: Plan, given: Plan, budget: Budget) -> bool:
    """Whether a plan removes what the budget says, and hardly more than the given one."""
    removed = removed_by(budget, plan.layers)
    return removed >= budget.target and removed - removed_by(budget, given.layers) <= TOLERANCE * budget.total


def interpolate(
    plan: Plan,
    cheapest: Plan,
    shape: ModelShape,
    share: float,
    round_to: int = 1,
    *,
    budget: Budget | None = None,
) -> Plan:
    """Linear interpolation between the widths of two plans; removes as much as the first.

    Measured costs are noisy, and the cheapest widths overfit them; a schedule ignores the model but has no outliers.
    Costs are convex in the removed share, so the mean of two plans costs less than their mean cost.

    Args:
        plan: one end, with the unit of heads.
        cheapest: the result of :func:`allocate_budget` for it.
        share: 0 is ``plan``, 1 is ``cheapest``.
        round_to: every FFN width becomes a multiple of it.
        budget: what is to be removed; as many parameters as ``plan`` removes if not given.
    """
    budget = budget or parameters_of(plan, shape)

    def mean(one: int, two: int) -> float:
        return (1 - share) * one + share * two

    layers = []
    for layer, one, two in zip(shape.layers, plan.layers, cheapest.layers, strict=True):
        heads = round(mean(head_units(one, plan.head_unit), head_units(two, plan.head_unit)))
        if layer.attention_parameters and not two[HEADS]:
            heads = 0  # there is nothing between a whole attention and none
        ffn = {}
        for unit in free_units(layer):
            field = FIELDS[unit]
            widths = widths_of(layer.sizes[field], step_of_unit(layer, unit, round_to))
            ffn[field] = nearest(widths, mean(one[field], two[field]))
        layers.append(tied_to(layer, with_heads(layer, plan.head_unit, heads, ffn)))
    adjust_to_target(shape, layers, round_to, budget)
    mixed = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio, round_to=round_to)
    return mixed if _within(mixed, plan, budget) else cheapest


def predicted_cost(plan: Plan, shape: ModelShape, costs: Sensitivity) -> float:
    """The cost of a plan's widths, in nats per token: the sum over structures of their extrapolated contributions.

    Args:
        costs: with contributions of every structure that the plan narrows.
    """
    total = 0.0
    for cost in costs.with_floor():
        dense, sizes = shape.layers[cost.layer].sizes, plan.layers[cost.layer]
        if cost.unit in FIELDS:
            before, after = dense[FIELDS[cost.unit]], sizes[FIELDS[cost.unit]]
        else:
            before, after = head_units(dense, cost.unit), head_units(sizes, cost.unit)
        total += cost.at(1 - after / before)
    return total


def cheapest_options(
    options: dict[tuple[int, str], list[WidthOption]], target: float
) -> dict[tuple[int, str], WidthOption] | None:
    """One option per structure that together remove ``target`` or little more; ``None`` if none do."""

    def choice(price: float) -> dict[tuple[int, str], WidthOption]:
        return {
            key: min(steps, key=lambda option: option.cost - price * option.removed) for key, steps in options.items()
        }

    def removed(price: float) -> int:
        return sum(option.removed for option in choice(price).values())

    low, high = 0.0, 1e-12
    while removed(high) < target:
        if high > 1e6:
            return None
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < target else (low, middle)
    return choice(high)


@dataclass(frozen=True)
class WidthOption:
    """One width that a structure may get: what stays, how much of the budget goes, and what that costs."""

    keep: int
    removed: int
    cost: float


def _options(
    shape: ModelShape,
    costs: Sequence[StructureCost],
    head_unit: str,
    round_to: int,
    kv_heads: Sequence[int] | None,
    budget: Budget,
) -> dict[tuple[int, str], list[WidthOption]]:
    """The candidate widths of every structure, by layer and unit; a shared expert that follows the others' width is
    paid for with them."""
    shared = {cost.layer: cost.cost for cost in costs if cost.unit == "shared"}
    options: dict[tuple[int, str], list[WidthOption]] = {}
    narrowed: dict[int, float] = {}  # what the heads that the trial plan removes cost
    for cost in costs:
        layer = shape.layers[cost.layer]
        if cost.unit == head_unit:
            units = head_units(layer.sizes, head_unit)
            keeps = range(units, 0, -1) if kv_heads is None else [kv_heads[cost.layer]]
            options[cost.layer, head_unit] = [
                WidthOption(k, budget.of_structure(cost.layer, head_unit, k), cost.at(1 - k / units)) for k in keeps
            ]
            narrowed[cost.layer] = cost.cost
        elif cost.unit in free_units(layer):
            paid = cost
            if cost.unit == "ffn" and "shared" not in free_units(layer):
                paid = replace(cost, cost=cost.cost + shared.get(cost.layer, 0.0))
            options[cost.layer, cost.unit] = _widths(layer, paid, round_to, budget)
    for cost in costs:
        if cost.unit == ATTENTION:
            layer = shape.layers[cost.layer]
            whole = WidthOption(head_units(layer.sizes, head_unit), 0, 0.0)
            gone = budget.of_structure(cost.layer, head_unit, 0)
            none = WidthOption(0, gone, narrowed.get(cost.layer, 0.0) + cost.cost)
            options.setdefault((cost.layer, head_unit), [whole]).append(none)
    return options


def _widths(layer: LayerShape, cost: StructureCost, round_to: int, budget: Budget) -> list[WidthOption]:
    """The candidate widths of an FFN, of all experts or of a shared expert."""
    size = layer.sizes[FIELDS[cost.unit]]
    step = step_of_unit(layer, cost.unit, round_to)
    stride = max(size // STEPS // step, 1) * step
    widths = [w for w in range(size // step * step, 0, -stride) if w >= (1 - MAX_FFN_REMOVED) * size]
    return [WidthOption(w, budget.of_structure(cost.layer, cost.unit, w), cost.at(1 - w / size)) for w in widths]
