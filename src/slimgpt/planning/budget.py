"""Where to spend a budget of parameters: the cheapest widths that remove it, from measured costs.

Costs of single structures do not simply add up. Heads especially stand in for each other: each of them alone is cheap
to remove, all of them together are not. So the same structures are also narrowed *jointly*, in every layer at once,
and what that costs beyond the sum makes each unit of that kind dearer the more of them go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimgpt.models.architectures import CHANNELS
from slimgpt.models.shape import ModelShape
from slimgpt.planning.plan import TOLERANCE, Plan, head_units, plan_of_widths, removed_parameters, with_heads

MOST = 0.75
"""No more than this share of a layer's FFN channels goes: the largest at which costs are measured."""

STEPS = 64
"""In how many steps the width of an FFN is chosen; what is left over is given back channel by channel."""

POWERS = (1.35, 4.0)
"""Costs grow by a power of the share that is removed which is at least the one and at most the other."""

ROUNDS = 12
"""How often prices and what goes at them are brought into agreement."""


@dataclass(frozen=True)
class Curve:
    """What it costs to remove a share of the units of one structure, everything else left as it is.

    Args:
        layer: index of the layer.
        unit: ``kv``, ``query`` or ``ffn``.
        removed: shares of the units, rising, in (0, 1).
        cost: for each of them the cost, such as the divergence of the model's predictions from the dense model's.
    """

    layer: int
    unit: str
    removed: tuple[float, ...]
    cost: tuple[float, ...]

    def at(self, share: float) -> float:
        """The cost of any share: straight between measured points on logarithmic axes, so that it is 0 at 0."""
        if share <= 0:
            return 0.0
        xs, ys = self.removed, _convex(self.removed, self.cost)
        if len(xs) == 1:
            return ys[0] * (share / xs[0]) ** POWERS[0]
        i = min(max(sum(x < share for x in xs), 1), len(xs) - 1)
        slope = math.log(ys[i] / ys[i - 1]) / math.log(xs[i] / xs[i - 1])
        return ys[i] * (share / xs[i]) ** slope

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured on a model.

    Args:
        curves: one per structure, each narrowed alone.
        joint: by unit, the cost of narrowing this structure in all layers at once; ``layer`` is -1.
    """

    curves: tuple[Curve, ...]
    joint: dict[str, Curve]

    def dearer(self, unit: str, total: float) -> float:
        """How much dearer a structure of this unit is than alone, where costs of its kind sum up to ``total``.

        The joint cost is taken to follow the sum of the single ones as a power between measured points; this is the
        slope, ``d joint / d sum``.
        """
        joint = self.joint.get(unit)
        if joint is None:
            return 1.0
        curves = [curve for curve in self.curves if curve.unit == unit]
        sums = [sum(curve.at(share) for curve in curves) for share in joint.removed]
        costs = _convex(sums, joint.cost) if len(sums) > 1 else joint.cost
        if len(sums) == 1:
            return costs[0] / sums[0]
        i = min(max(sum(x < total for x in sums), 1), len(sums) - 1)
        power = math.log(costs[i] / costs[i - 1]) / math.log(sums[i] / sums[i - 1])
        return power * costs[i] / sums[i] * (max(total, sums[0] / 4) / sums[i]) ** (power - 1)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def _convex(shares: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Costs made positive and convex: between neighbouring points they grow by a power within :data:`POWERS`.

    Small costs are measured less exactly than large ones (rounding and few tokens add to them), so it is they that give
    way. With costs that grow more slowly than in proportion, a budget would empty some structures and spare the others.
    """
    out = [max(costs[-1], 1e-7)]
    for i in range(len(costs) - 2, -1, -1):
        least, most = (out[0] * (shares[i] / shares[i + 1]) ** power for power in reversed(POWERS))
        out.insert(0, min(max(costs[i], least), most))
    return out


def spend(plan: Plan, shape: ModelShape, costs: Sensitivity, round_to: int = 1, heads: bool = True) -> Plan:
    """A plan that removes as much as ``plan`` does, where it costs least.

    Every structure takes the step whose cost minus price times removed parameters is the lowest, at the one price for
    which the target is met (a Lagrange multiplier); costs of each kind are scaled by how much dearer that kind is at
    what goes of it, until the two agree. What is removed beyond the target is given back as channels.

    Args:
        plan: says how much goes, and the unit of heads.
        shape: the dense model.
        costs: structures without a curve stay as they are in the model.
        round_to: every FFN width becomes a multiple of it.
        heads: whether heads may be chosen; else their numbers are those of ``plan``.
    """
    target = plan.parameters_before - plan.parameters
    given = None if heads else [head_units(sizes, plan.head_unit) for sizes in plan.layers]
    options = _options(shape, costs.curves, plan.head_unit, round_to, given)
    units = {plan.head_unit, "ffn"}
    scale = dict.fromkeys(units, 1.0)
    taken: dict[tuple[int, str], _Option] = {}
    for _ in range(ROUNDS):
        found = _cheapest(options, target, scale)
        if found is None:
            return plan  # what was measured cannot remove as much
        taken = found
        for unit in units:
            total = sum(option.cost for (_, kind), option in taken.items() if kind == unit)
            scale[unit] = math.sqrt(scale[unit] * costs.dearer(unit, total))
    layers = []
    for index, layer in enumerate(shape.layers):
        kept = taken.get((index, plan.head_unit), _Option(head_units(layer.sizes, plan.head_unit), 0, 0.0)).keep
        channels = taken.get((index, "ffn"), _Option(layer.sizes[CHANNELS], 0, 0.0)).keep
        layers.append(with_heads(layer, plan.head_unit, kept, {CHANNELS: channels}))
    _give_back(shape, layers, target, round_to)
    spent = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio)
    return spent if spent.achieved - plan.achieved <= TOLERANCE else plan  # heads can be too coarse for a small budget


def _cheapest(
    options: dict[tuple[int, str], list[_Option]], target: int, scale: dict[str, float]
) -> dict[tuple[int, str], _Option] | None:
    """One option per structure that together remove ``target`` parameters or little more; ``None`` if none do."""

    def choice(price: float) -> dict[tuple[int, str], _Option]:
        return {
            key: min(steps, key=lambda option: option.cost * scale[key[1]] - price * option.removed)
            for key, steps in options.items()
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
    shape: ModelShape, curves: Sequence[Curve], head_unit: str, round_to: int, kv_heads: Sequence[int] | None
) -> dict[tuple[int, str], list[_Option]]:
    """For every layer and kind of structure what may be kept of it."""
    found: dict[tuple[int, str], list[_Option]] = {}
    for curve in curves:
        layer = shape.layers[curve.layer]
        if curve.unit == "ffn":
            size, each = layer.sizes[CHANNELS], layer.unit_parameters["ffn"]
            step = max(size // STEPS // round_to, 1) * round_to
            widths = [w for w in range(size // round_to * round_to, 0, -step) if w >= (1 - MOST) * size]
            found[curve.layer, "ffn"] = [_Option(w, (size - w) * each, curve.at(1 - w / size)) for w in widths]
        elif curve.unit == head_unit:
            units, each = head_units(layer.sizes, head_unit), layer.unit_parameters[head_unit]
            keeps = range(units, 0, -1) if kv_heads is None else [kv_heads[curve.layer]]
            found[curve.layer, head_unit] = [_Option(k, (units - k) * each, curve.at(1 - k / units)) for k in keeps]
    return found


def _give_back(shape: ModelShape, layers: list[dict[str, int]], target: int, round_to: int) -> None:
    """Widen narrowed FFNs in place, one step each in turn, as long as the target is still met."""
    over = sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers)) - target
    moved = True
    while moved:
        moved = False
        for layer, sizes in zip(shape.layers, layers):
            each = round_to * layer.unit_parameters.get("ffn", over + 1)
            if over >= each and sizes[CHANNELS] + round_to <= layer.sizes[CHANNELS]:
                sizes[CHANNELS] += round_to
                over -= each
                moved = True
