"""The split of a budget between heads and FFN channels where all layers are to be equal, by measured costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimgpt.models.architecture import CHANNELS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.alignment import EQUAL_TOLERANCE
from slimgpt.planning.allocation import MAX_FFN_REMOVED, Sensitivity, StructureCost
from slimgpt.planning.budget import Budget, ParameterBudget
from slimgpt.planning.ffn import nearest, widths_of
from slimgpt.planning.plan import Plan, head_units, plan_of_widths, with_heads

ROUNDING = 1e-9
"""Rounding of a target that is a product of fractions, as a share of it."""


@dataclass(frozen=True)
class EqualPair:
    """Widths that all layers could have, and what they would cost.

    Args:
        heads: units of heads that every layer keeps.
        channels: FFN channels that every layer keeps.
        cost: the sum over layers of the measured costs, in nats per token, at the real number of channels with which
            the pair would remove exactly what was asked for: one that removes less is not cheaper for that.
        error: by how much the share removed differs from the one asked for.
    """

    heads: int
    channels: int
    cost: float
    error: float


def equal_pairs(
    plan: Plan,
    shape: ModelShape,
    costs: Sensitivity,
    heads: Sequence[int],
    *,
    exceeding: bool = False,
    budget: Budget | None = None,
) -> list[EqualPair]:
    """The pairs of heads and channels that remove as much as was asked for, the best first.

    Those within :data:`~slimgpt.planning.alignment.EQUAL_TOLERANCE` come first, by cost; then the others, by error.

    Args:
        plan: equal layers: the share asked for, the unit of heads, and the step of FFN widths.
        shape: the dense model, whose layers are equal.
        costs: of heads and channels in all layers.
        heads: the numbers of units of heads to choose from.
        exceeding: whether at least as much must be removed as was asked for; pairs that remove less are left out.
        budget: what is to be removed; the share of parameters that ``plan`` was asked for if not given.
    """
    first = shape.layers[0]
    size, units = first.sizes[CHANNELS], head_units(first.sizes, plan.head_unit)
    budget = budget or ParameterBudget(shape, plan.ratio * shape.layer_parameters)
    target = budget.target / len(shape.layers)
    widths = widths_of(size, plan.round_to if first.has_ffn else size)
    least = (1 - MAX_FFN_REMOVED) * size
    floored = costs.with_floor()

    def achieved(kept: int, channels: int) -> tuple[float, float]:
        """The amount that a layer of these widths loses, and the error of the share."""
        removed = budget.of_layer(0, with_heads(first, plan.head_unit, kept, {CHANNELS: channels}))
        return removed, abs(removed - target) * len(shape.layers) / budget.total

    pairs = []
    for kept in heads:
        rest = target - budget.of_structure(0, plan.head_unit, kept)
        exact = min(budget.channels_for(0, rest), float(size))
        if exact < widths[0] / 2:
            continue
        channels = nearest(widths, exact)
        if exceeding and channels > exact and channels > widths[0]:
            channels -= widths.step
        removed, error = achieved(kept, channels)
        if not exceeding and channels < least <= channels + widths.step:  # the next width may be near enough, too
            wider = achieved(kept, channels + widths.step)
            if wider[1] <= EQUAL_TOLERANCE:
                channels, (removed, error) = channels + widths.step, wider
        if exceeding and removed < target * (1 - ROUNDING):
            continue
        too_narrow = channels < least
        cost = pair_cost(floored, plan.head_unit, 1 - kept / units, 1 - exact / size)
        pairs.append(((too_narrow, 0.0 if error <= EQUAL_TOLERANCE else error, cost), kept, channels, cost, error))
    return [EqualPair(*rest) for _, *rest in sorted(pairs)]


def pair_cost(costs: Sequence[StructureCost], head_unit: str, heads: float, channels: float) -> float:
    """The cost of removing the same shares of heads and of channels from all layers."""
    shares = {head_unit: heads, "ffn": channels}
    return sum(cost.at(shares[cost.unit]) for cost in costs if cost.unit in shares)


def plan_of_pair(plan: Plan, shape: ModelShape, pair: EqualPair) -> Plan:
    """The plan that gives all layers the widths of a pair."""
    layers = [with_heads(each, plan.head_unit, pair.heads, {CHANNELS: pair.channels}) for each in shape.layers]
    return plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio, round_to=plan.round_to)
