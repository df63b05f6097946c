"""Where to spend a budget of parameters: the cheapest widths that remove it, from measured contributions.

Costs of structures narrowed alone do not add up: heads stand in for each other, and errors of neighbouring layers
compound. So a model that is narrowed *everywhere* is looked at, and what was lost is divided among its structures;
from there each structure's cost is taken to follow a power of the share of it that is removed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimgpt.models.architecture import CHANNELS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.plan import TOLERANCE, Plan, head_units, plan_of_widths, removed_parameters, with_heads

MOST, LEAST = 0.75, 0.02
"""At most and, in a trial, at least this share of a layer's FFN channels goes."""

STEPS = 64
"""In how many steps the width of an FFN is chosen; what is left over is given back channel by channel."""

POWERS = {"ffn": 1.5, "query": 4.0, "kv": 2.2}
"""The cost of a structure grows by this power of the share that is removed. The channels' is what two texts and two
models were served best by; heads are few, and the last ones do the work of all that went before."""

FLOOR = 0.3
"""No structure counts less than this share of the median of its kind: small contributions are mostly noise, and can
come out negative."""


@dataclass(frozen=True)
class StructureCost:
    """What one structure has lost of the quality of a narrowed model.

    Args:
        layer: index of the layer.
        unit: ``kv``, ``query`` or ``ffn``.
        removed: the share of its units that was removed, in (0, 1).
        cost: its part of the divergence of the model's predictions from the dense model's, in nats per token.
    """

    layer: int
    unit: str
    removed: float
    cost: float

    def at(self, share: float) -> float:
        """The cost of any share."""
        return self.cost * (share / self.removed) ** POWERS[self.unit]


@dataclass(frozen=True)
class Sensitivity:
    """What was measured on a narrowed model.

    Args:
        divergence: ``KL(dense || narrowed)`` in nats per token.
        contributions: of every structure that was narrowed; as measured.
    """

    divergence: float
    contributions: tuple[StructureCost, ...]

    def raised(self) -> list[StructureCost]:
        """The contributions with those that are too small to be believed raised to the :data:`FLOOR`."""
        out = []
        for unit in sorted({c.unit for c in self.contributions}):
            kind = [c for c in self.contributions if c.unit == unit]
            floor = max(FLOOR * statistics.median(c.cost for c in kind), 1e-9)
            out += [StructureCost(c.layer, unit, c.removed, max(c.cost, floor)) for c in kind]
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def trial(plan: Plan, shape: ModelShape, heads: bool = True) -> Plan:
    """A plan that removes about as much as ``plan`` does, and something of every structure of every layer.

    Args:
        heads: whether heads may be chosen; else their numbers are those of ``plan``.
    """
    target = plan.parameters_before - plan.parameters
    share = target / shape.layer_parameters
    layers = []
    for layer, sizes in zip(shape.layers, plan.layers, strict=True):
        units = head_units(layer.sizes, plan.head_unit)
        keep = max(units - max(int(share * units), 1), min(units, 1))
        dense = {CHANNELS: layer.sizes[CHANNELS]}
        layers.append(with_heads(layer, plan.head_unit, keep, dense) if heads else {**sizes, **dense})
    left = target - sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers))
    channels = sum(layer.unit_parameters.get("ffn", 0) * layer.sizes[CHANNELS] for layer in shape.layers)
    narrowed = min(max(left / max(channels, 1), LEAST), MOST)
    for layer, sizes in zip(shape.layers, layers):
        if "ffn" in layer.unit_parameters:
            sizes[CHANNELS] = max(layer.sizes[CHANNELS] - max(round(narrowed * layer.sizes[CHANNELS]), 1), 1)
    return plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)


def spend(plan: Plan, shape: ModelShape, costs: Sensitivity, round_to: int = 1, heads: bool = True) -> Plan:
    """A plan that removes as much as ``plan`` does, where it costs least.

    Every structure takes the step whose cost minus price times removed parameters is the lowest, at the one price for
    which the target is met (a Lagrange multiplier). What is removed beyond the target is given back as channels.

    Args:
        plan: says how much goes, and the unit of heads.
        shape: the dense model.
        costs: structures without a contribution stay as they are in the model.
        round_to: every FFN width becomes a multiple of it.
        heads: whether heads may be chosen; else their numbers are those of ``plan``.
    """
    target = plan.parameters_before - plan.parameters
    given = None if heads else [head_units(sizes, plan.head_unit) for sizes in plan.layers]
    taken = _cheapest(_options(shape, costs.raised(), plan.head_unit, round_to, given), target)
    if taken is None:
        return plan  # what was measured cannot remove as much
    layers = []
    for index, layer in enumerate(shape.layers):
        kept = taken.get((index, plan.head_unit), _Option(head_units(layer.sizes, plan.head_unit), 0, 0.0)).keep
        channels = taken.get((index, "ffn"), _Option(layer.sizes[CHANNELS], 0, 0.0)).keep
        layers.append(with_heads(layer, plan.head_unit, kept, {CHANNELS: channels}))
    _settle(shape, layers, target, round_to)
    spent = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)
    return spent if spent.achieved - plan.achieved <= TOLERANCE else plan  # heads can be too coarse for a small budget


def between(plan: Plan, spent: Plan, shape: ModelShape, share: float, round_to: int = 1) -> Plan:
    """Widths on the way from one plan to another, which remove as much as the first one.

    What is measured scatters, and the cheapest widths follow it into extremes; a schedule knows nothing of the model
    but has no outliers. Costs grow faster than what is removed, so a mean of two plans costs less than they do on
    average.

    Args:
        plan: says how much goes, and the unit of heads.
        spent: what :func:`spend` gave for it.
        share: of the way that is gone: 0 is ``plan``, 1 is ``spent``.
        round_to: every FFN width becomes a multiple of it.
    """
    target = plan.parameters_before - plan.parameters

    def mean(one: int, two: int) -> float:
        return (1 - share) * one + share * two

    layers = []
    for layer, one, two in zip(shape.layers, plan.layers, spent.layers, strict=True):
        heads = round(mean(head_units(one, plan.head_unit), head_units(two, plan.head_unit)))
        channels = round(mean(one[CHANNELS], two[CHANNELS]) / round_to) * round_to
        layers.append(with_heads(layer, plan.head_unit, heads, {CHANNELS: channels}))
    _settle(shape, layers, target, round_to)
    found = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)
    return found if abs(found.achieved - plan.achieved) <= TOLERANCE else spent


def _cheapest(options: dict[tuple[int, str], list[_Option]], target: int) -> dict[tuple[int, str], _Option] | None:
    """One option per structure that together remove ``target`` parameters or little more; ``None`` if none do."""

    def choice(price: float) -> dict[tuple[int, str], _Option]:
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
class _Option:
    keep: int
    removed: int
    cost: float


def _options(
    shape: ModelShape, costs: Sequence[StructureCost], head_unit: str, round_to: int, kv_heads: Sequence[int] | None
) -> dict[tuple[int, str], list[_Option]]:
    """For every layer and kind of structure what may be kept of it."""
    found: dict[tuple[int, str], list[_Option]] = {}
    for cost in costs:
        layer = shape.layers[cost.layer]
        if cost.unit == "ffn":
            size, each = layer.sizes[CHANNELS], layer.unit_parameters["ffn"]
            step = max(size // STEPS // round_to, 1) * round_to
            widths = [w for w in range(size // round_to * round_to, 0, -step) if w >= (1 - MOST) * size]
            found[cost.layer, "ffn"] = [_Option(w, (size - w) * each, cost.at(1 - w / size)) for w in widths]
        elif cost.unit == head_unit:
            units, each = head_units(layer.sizes, head_unit), layer.unit_parameters[head_unit]
            keeps = range(units, 0, -1) if kv_heads is None else [kv_heads[cost.layer]]
            found[cost.layer, head_unit] = [_Option(k, (units - k) * each, cost.at(1 - k / units)) for k in keeps]
    return found


def _settle(shape: ModelShape, layers: list[dict[str, int]], target: int, round_to: int) -> None:
    """Narrow FFNs in place, one step each in turn, until the target is met or none can be narrowed; then widen them the
    same way as long as it still is."""
    over = sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers)) - target
    steps = [
        (round_to * layer.unit_parameters["ffn"], layer, sizes)
        for layer, sizes in zip(shape.layers, layers)
        if "ffn" in layer.unit_parameters
    ]
    moved = True
    while moved and over < 0:
        moved = False
        for each, _, sizes in steps:
            if over < 0 and sizes[CHANNELS] > round_to:
                sizes[CHANNELS] -= round_to
                over += each
                moved = True
    moved = True
    while moved:
        moved = False
        for each, layer, sizes in steps:
            if over >= each and sizes[CHANNELS] + round_to <= layer.sizes[CHANNELS]:
                sizes[CHANNELS] += round_to
                over -= each
                moved = True
