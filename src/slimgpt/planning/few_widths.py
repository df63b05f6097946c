"""Widths in a few steps: between equal layers and layers of any width.

Layers are divided into groups that share a width, so that what the groups lose beyond the given plan is the least. The
loss of a width is how far the measured cost of a structure lies above its tangent at the planned width (a Bregman
divergence): what the plan removes elsewhere for it is paid for by the tangent. Without measured costs it is the square
of the difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS, HEADS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.allocation import POWERS, STEPS, Sensitivity, StructureCost
from slimgpt.planning.budget import Budget, ParameterBudget, removed_by
from slimgpt.planning.ffn import step_of_unit, tied_to, widths_of
from slimgpt.planning.plan import Plan, head_units, plan_of_widths, with_heads


def in_few_widths(
    plan: Plan,
    shape: ModelShape,
    count: int | None,
    costs: Sensitivity | None = None,
    *,
    budget: Budget | None = None,
    heads: bool = True,
) -> Plan:
    """A plan near another one, with at most so many FFN widths and numbers of heads; removes as much, or hardly more.

    Args:
        plan: the widths without such a limit, with the step of FFN widths and the unit of heads.
        shape: the dense model. Layers of which nothing can be removed stay as they are, and do not count.
        count: the number of widths; ``None`` leaves the plan as it is.
        costs: of the structures, as measured; the squares of the differences count where there are none.
        budget: what is to be removed; the share of parameters that the plan was asked for if not given.
        heads: whether numbers of heads may change, too.

    Raises:
        PlanError: a mixture of experts.
    """
    if count is None:
        return plan
    if any(layer.experts is not None for layer in shape.layers):
        raise PlanError("num_widths groups FFNs, and experts of a mixture are as wide as trials say; leave it out")
    # Rounded up but for the rounding of a share that was made from a number of parameters.
    budget = budget or ParameterBudget(shape, math.ceil(plan.ratio * shape.layer_parameters - 1e-3))
    measured = {} if costs is None else {(cost.layer, cost.unit): cost for cost in costs.with_floor()}
    layers = [dict(sizes) for sizes in plan.layers]
    if heads:
        unit = plan.head_unit
        with_any = [i for i in _layers_with(shape, unit) if head_units(layers[i], unit)]
        units = {i: head_units(shape.layers[i].sizes, unit) for i in with_any}
        kept = {i: head_units(layers[i], unit) for i in with_any}
        for group in _groups(kept, units, dict.fromkeys(with_any, 1), count, measured, unit):
            for i in group.layers:
                ffn = {name: value for name, value in layers[i].items() if "heads" not in name}
                layers[i] = with_heads(shape.layers[i], unit, group.width, ffn)
    free = _layers_with(shape, "ffn")
    sizes = {i: shape.layers[i].sizes[CHANNELS] for i in free}
    steps = {i: step_of_unit(shape.layers[i], "ffn", plan.round_to) for i in free}
    groups = _groups({i: layers[i][CHANNELS] for i in free}, sizes, steps, count, measured, "ffn")
    for group in groups:
        _set_width(shape, layers, group.layers, group.width)
    _meet_target(shape, layers, groups, plan, budget)
    return plan_of_widths(shape, layers, plan.head_unit, plan.ratios, plan.ratio, round_to=plan.round_to)


@dataclass
class _Group:
    """Layers that share a width."""

    layers: list[int]
    width: int
    step: int


def _layers_with(shape: ModelShape, unit: str) -> list[int]:
    return [
        index
        for index, layer in enumerate(shape.layers)
        if unit in layer.unit_parameters and (unit != "ffn" or layer.has_ffn)
    ]


def _set_width(shape: ModelShape, layers: list[dict[str, int]], indices: Sequence[int], width: int) -> None:
    for index in indices:
        layers[index] = tied_to(shape.layers[index], {**layers[index], CHANNELS: width})


def _groups(
    planned: dict[int, int],
    sizes: dict[int, int],
    steps: dict[int, int],
    count: int,
    costs: dict[tuple[int, str], StructureCost],
    unit: str,
) -> list[_Group]:
    """The division of layers into groups of the least loss, by dynamic programming over layers in order of their width.

    Args:
        planned: the width of each layer.
        sizes: of the dense model.
        steps: that a width is a multiple of.
    """
    if not planned:
        return []
    order = sorted(planned, key=lambda index: (planned[index], index))
    step = math.lcm(*steps.values())
    widest = max(sizes.values())
    stride = max(widest // STEPS // step, 1) * step
    widths = sorted({*widths_of(widest, stride), *(w for w in planned.values() if w % step == 0)} or {step})
    losses = np.array([_losses(planned[i], sizes[i], widths, costs.get((i, unit))) for i in order])
    best = [[math.inf] * (len(order) + 1) for _ in range(count + 1)]
    cut = [[(0, 0)] * (len(order) + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for first in range(len(order)):
        sums = np.cumsum(losses[first:], axis=0)
        for length, (total, at) in enumerate(zip(sums.min(axis=1), sums.argmin(axis=1)), start=1):
            for used in range(count):
                if (loss := best[used][first] + total) < best[used + 1][first + length]:
                    best[used + 1][first + length], cut[used + 1][first + length] = loss, (first, widths[at])
    used, end = min(range(1, count + 1), key=lambda number: best[number][-1]), len(order)
    groups: list[_Group] = []
    while end:
        first, width = cut[used][end]
        groups.append(_Group(order[first:end], width, step))
        used, end = used - 1, first
    return groups[::-1]


def _losses(planned: int, size: int, widths: Sequence[int], cost: StructureCost | None) -> list[float]:
    """The loss of each width for a layer; infinity beyond its size."""
    share = 1 - planned / size
    if cost is None:
        return [(width - planned) ** 2 / size**2 if width <= size else math.inf for width in widths]
    power = POWERS[cost.unit]
    slope = power * cost.cost / cost.removed * (share / cost.removed) ** (power - 1)
    tangent = [cost.at(share) + slope * (planned - width) / size for width in widths]
    return [cost.at(1 - w / size) - line if w <= size else math.inf for w, line in zip(widths, tangent)]


def _meet_target(
    shape: ModelShape, layers: list[dict[str, int]], groups: list[_Group], plan: Plan, budget: Budget
) -> None:
    """Narrow and widen whole groups, then move single layers to the next wider group, so that the target is met."""

    def over() -> float:
        return removed_by(budget, layers) - budget.target

    def changed(indices: Sequence[int], width: int) -> float:
        """The amount that goes beyond the target once these layers have a width."""
        before = {index: layers[index] for index in indices}
        _set_width(shape, layers, indices, width)
        value = over()
        for index, sizes in before.items():
            layers[index] = sizes
        return value

    def narrower(group: _Group) -> Iterator[int]:
        """Widths that save something; a flat part of a curve of times is passed over."""
        now = over()
        return (w for w in range(group.width - group.step, 0, -group.step) if changed(group.layers, w) > now)

    moved = True
    while moved and over() < 0:
        moved = False
        for group in groups:
            if over() < 0 and (width := next(narrower(group), None)) is not None:
                group.width, moved = width, True
                _set_width(shape, layers, group.layers, width)
    moved = True
    while moved:
        moved = False
        for group in groups:
            width = group.width + group.step
            widest = min((shape.layers[i].sizes[CHANNELS] for i in group.layers), default=0)
            if width <= widest and changed(group.layers, width) >= 0:
                group.width, moved = width, True
                _set_width(shape, layers, group.layers, width)
    widths = sorted({group.width for group in groups})
    wider = dict(pairwise(widths))
    single = [i for group in groups for i in group.layers]
    # Those first that lie most below their planned width.
    for index in sorted(single, key=lambda i: layers[i][CHANNELS] - plan.layers[i][CHANNELS]):
        width = wider.get(layers[index][CHANNELS])
        if width is not None and width <= shape.layers[index].sizes[CHANNELS] and changed([index], width) >= 0:
            _set_width(shape, layers, [index], width)


def widths_text(plan: Plan) -> str:
    """The FFN widths and numbers of heads of a plan, each with the number of its layers, as people read them."""
    parts = []
    for title, field in (("FFN channels", CHANNELS), ("heads", HEADS)):
        number = Counter(sizes[field] for sizes in plan.layers)
        parts.append(f"{title} {', '.join(f'{width} ({count})' for width, count in sorted(number.items()))}")
    return "; ".join(parts)
