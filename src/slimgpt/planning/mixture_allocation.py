"""Allocation of a parameter budget in a mixture: heads, channels of experts, of shared experts and of dense layers.

As :mod:`slimgpt.planning.allocation`, with what differs: all experts of a layer have one width, a multiple of what the
kernel of all experts wants, and a shared expert has a width of its own or follows theirs. All experts stay.
"""

from __future__ import annotations

from dataclasses import replace

from slimgpt.models.architecture import CHANNELS
from slimgpt.models.families.moe import SHARED
from slimgpt.models.parameter_counts import LayerShape, ModelShape
from slimgpt.planning.allocation import (
    MAX_FFN_REMOVED,
    MIN_FFN_REMOVED,
    STEPS,
    Sensitivity,
    StructureCost,
    WidthOption,
    cheapest_options,
)
from slimgpt.planning.ffn import step_of, tied_to
from slimgpt.planning.plan import TOLERANCE, Plan, head_units, plan_of_widths, removed_parameters, with_heads

FIELDS = {"ffn": CHANNELS, "shared": SHARED}
"""The size that a unit other than heads counts."""


def free_units(layer: LayerShape) -> list[str]:
    """The units of a layer whose widths can be chosen: channels, and those of a shared expert of its own width."""
    own = layer.experts is not None and not layer.experts.tied and SHARED in layer.sizes
    return [*(["ffn"] if layer.has_ffn else []), *(["shared"] if own else [])]


def step_of_unit(layer: LayerShape, unit: str, round_to: int) -> int:
    """The number that a width is a multiple of."""
    return step_of(layer, round_to) if unit == "ffn" else min(round_to, layer.sizes[SHARED])


def trial_mixture(plan: Plan, shape: ModelShape, heads: bool = True) -> Plan:
    """A plan that removes about as much as ``plan`` does, and something of every structure of every layer.

    Args:
        heads: whether heads may be chosen; else their numbers are those of ``plan``.
    """
    target = plan.parameters_before - plan.parameters
    share = target / shape.layer_parameters
    layers = []
    for layer, sizes in zip(shape.layers, plan.layers, strict=True):
        units = head_units(layer.sizes, plan.head_unit)
        keep = max(units - max(int(share * units), 1), 1) if heads else head_units(sizes, plan.head_unit)
        layers.append(with_heads(layer, plan.head_unit, keep, {}))
    left = target - sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers))
    wide = sum(layer.unit_parameters[u] * layer.sizes[FIELDS[u]] for layer in shape.layers for u in free_units(layer))
    narrowed = min(max(left / max(wide, 1), MIN_FFN_REMOVED), MAX_FFN_REMOVED)
    for index, layer in enumerate(shape.layers):
        for unit in free_units(layer):
            size, step = layer.sizes[FIELDS[unit]], step_of_unit(layer, unit, 1)
            gone = max(round(narrowed * size / step), 1) * step
            layers[index][FIELDS[unit]] = max(size - gone, min(step, size))
        layers[index] = tied_to(layer, layers[index])
    return plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)


def allocate_mixture(plan: Plan, shape: ModelShape, costs: Sensitivity, round_to: int = 1, heads: bool = True) -> Plan:
    """The plan of least cost that removes as many parameters as ``plan``; see
    :func:`slimgpt.planning.allocation.allocate_budget`.

    A shared expert that follows the others' width is paid for with them.
    """
    target = plan.parameters_before - plan.parameters
    floored = costs.with_floor()
    shared = {c.layer: c.cost for c in floored if c.unit == "shared"}
    options: dict[tuple[int, str], list[WidthOption]] = {}
    for cost in floored:
        layer = shape.layers[cost.layer]
        if cost.unit == plan.head_unit:
            units, each = head_units(layer.sizes, cost.unit), layer.unit_parameters[cost.unit]
            keeps = range(units, 0, -1) if heads else [head_units(plan.layers[cost.layer], cost.unit)]
            options[cost.layer, cost.unit] = [WidthOption(k, (units - k) * each, cost.at(1 - k / units)) for k in keeps]
        elif cost.unit in free_units(layer):
            paid = cost
            if cost.unit == "ffn" and "shared" not in free_units(layer):
                paid = replace(cost, cost=cost.cost + shared.get(cost.layer, 0.0))
            options[cost.layer, cost.unit] = _widths(layer, paid, round_to)
    chosen = cheapest_options(options, target)
    if chosen is None:
        return plan  # the measured structures cannot remove as much
    layers = []
    for index, layer in enumerate(shape.layers):
        kept = {unit: option.keep for (at, unit), option in chosen.items() if at == index}
        ffn = {FIELDS[unit]: keep for unit, keep in kept.items() if unit in FIELDS}
        count = kept.get(plan.head_unit, head_units(layer.sizes, plan.head_unit))
        layers.append(tied_to(layer, with_heads(layer, plan.head_unit, count, ffn)))
    _meet(shape, layers, target, round_to)
    cheapest = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)
    return cheapest if cheapest.achieved - plan.achieved <= TOLERANCE else plan


def interpolate_mixture(plan: Plan, cheapest: Plan, shape: ModelShape, share: float, round_to: int = 1) -> Plan:
    """Between the widths of two plans; see :func:`slimgpt.planning.allocation.interpolate`."""
    layers = []
    for layer, one, two in zip(shape.layers, plan.layers, cheapest.layers, strict=True):
        units = [head_units(sizes, plan.head_unit) for sizes in (one, two)]
        ffn = {}
        for unit in free_units(layer):
            field, step = FIELDS[unit], step_of_unit(layer, unit, round_to)
            mean = (1 - share) * one[field] + share * two[field]
            ffn[field] = min(max(round(mean / step), 1) * step, layer.sizes[field])
        count = round((1 - share) * units[0] + share * units[1])
        layers.append(tied_to(layer, with_heads(layer, plan.head_unit, count, ffn)))
    _meet(shape, layers, plan.parameters_before - plan.parameters, round_to)
    mixed = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)
    return mixed if abs(mixed.achieved - plan.achieved) <= TOLERANCE else cheapest


def _widths(layer: LayerShape, cost: StructureCost, round_to: int) -> list[WidthOption]:
    """The candidate widths of experts, of a shared expert, or of a dense layer's FFN."""
    size, each = layer.sizes[FIELDS[cost.unit]], layer.unit_parameters[cost.unit]
    step = step_of_unit(layer, cost.unit, round_to)
    stride = max(size // STEPS // step, 1) * step
    widths = [w for w in range(size // step * step, 0, -stride) if w >= (1 - MAX_FFN_REMOVED) * size]
    return [WidthOption(w, (size - w) * each, cost.at(1 - w / size)) for w in widths]


def _meet(shape: ModelShape, layers: list[dict[str, int]], target: int, round_to: int) -> None:
    """Meet the target in place, round robin: narrow by one step each, then widen while it stays met."""
    steps = [
        (index, FIELDS[unit], step_of_unit(layer, unit, round_to), layer.unit_parameters[unit])
        for index, layer in enumerate(shape.layers)
        for unit in free_units(layer)
    ]
    over = sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers)) - target
    for direction in (-1, 1):
        moved = True
        while moved:
            moved = False
            for index, field, step, each in steps:
                width = layers[index][field] + direction * step
                wanted = over < 0 if direction < 0 else over >= step * each
                if wanted and step <= width <= shape.layers[index].sizes[field]:
                    layers[index] = tied_to(shape.layers[index], {**layers[index], field: width})
                    over -= direction * step * each
                    moved = True
