"""Equal layers: the cheapest pair of heads and channels, against every pair there is; targets met in steps."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from slimgpt.config import make_config
from slimgpt.models import describe
from slimgpt.models.stock_config import stock_config
from slimgpt.planning import Sensitivity, StructureCost, make_plan
from slimgpt.planning.alignment import EQUAL_TOLERANCE, preferred_step, why_not_nearer
from slimgpt.planning.allocation import FLOOR, POWERS, allocate_budget, interpolate
from slimgpt.planning.equal_widths import equal_pairs, plan_of_pair
from slimgpt.planning.plan import TOLERANCE
from slimgpt.planning.planner import plan_for
from tests.models.families import grouped_config

LAYERS = 4
CONFIG = grouped_config(LAYERS)
SHAPE = describe(CONFIG)


def large(width: int = 1536, layers: int = 6):
    """A model whose widths are rounded by default, in the proportions of SmolLM2."""
    return LlamaConfig(
        hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        intermediate_size=width, vocab_size=50,
    )  # fmt: skip


LARGE = {width: (large(width), describe(large(width))) for width in (1024, 1536, 4864)}


def sensitivity(scales: list[float], heads: list[float], unit: str = "query", heads_removed: float = 1 / 3):
    ffn = [StructureCost(i, "ffn", 0.4, s) for i, s in enumerate(scales)]
    query = [StructureCost(i, unit, heads_removed, s) for i, s in enumerate(heads)]
    return Sensitivity(sum(scales) + sum(heads), (*ffn, *query))


def floored(costs: list[float]) -> list[float]:
    """The bound for costs that are mostly noise, written once more."""
    middle = sorted(costs)
    half = len(middle) // 2
    median = middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) / 2
    return [max(cost, FLOOR * median, 1e-9) for cost in costs]


costs = st.lists(st.floats(1e-4, 1.0), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=60, deadline=None)
@given(costs, costs, st.floats(0.05, 0.6), st.sampled_from(["query", "kv"]))
def test_the_cheapest_pair_is_that_of_all_pairs(ffn, heads, ratio, unit):
    plan = make_plan(CONFIG, ratio, uniform=True, head_unit=unit, shape=SHAPE)
    layer = SHAPE.layers[0]
    units = 2 if unit == "query" else 3
    pairs = equal_pairs(plan, SHAPE, sensitivity(ffn, heads, unit, 1 / units), range(units, 0, -1))
    target = ratio * layer.parameters
    near = []
    for kept in range(1, units + 1):
        for channels in range(25, 101):
            gone = (units - kept) * layer.unit_parameters[unit] + (100 - channels) * layer.unit_parameters["ffn"]
            # The cost at the real width that removes exactly the target.
            exact = (target - (units - kept) * layer.unit_parameters[unit]) / layer.unit_parameters["ffn"] / 100
            cost = sum(
                f * (max(exact, 0.0) / 0.4) ** POWERS["ffn"] + h * ((units - kept) / units * units) ** POWERS[unit]
                for f, h in zip(floored(ffn), floored(heads))
            )
            if abs(gone - target) <= EQUAL_TOLERANCE * layer.parameters:
                near.append((cost, kept, channels))
    if not near:
        assert not pairs or pairs[0].error > EQUAL_TOLERANCE or pairs[0].channels < 25
        return
    best = min(cost for cost, _, _ in near)
    assert pairs[0].cost == pytest.approx(best, rel=1e-9)
    assert (pairs[0].heads, pairs[0].channels) in {(kept, channels) for _, kept, channels in near}
    assert [pair.heads for pair in pairs if pair.error <= EQUAL_TOLERANCE and pair.channels >= 25] == [
        kept for _, kept in sorted({(cost, kept) for cost, kept, _ in near})
    ]


@settings(max_examples=40, deadline=None)
@given(costs, costs, st.floats(0.05, 0.6))
def test_a_limit_is_never_exceeded_by_a_pair(ffn, heads, share):
    limit = int(SHAPE.parameters - share * SHAPE.layer_parameters)
    plan = make_plan(CONFIG, uniform=True, shape=SHAPE, limit=limit)
    for pair in equal_pairs(plan, SHAPE, sensitivity(ffn, heads, heads_removed=1 / 2), (2, 1), exceeding=True):
        assert plan_of_pair(plan, SHAPE, pair).parameters <= limit
        assert pair.error >= 0


def test_dear_heads_stay_and_cheap_heads_go():
    plan = make_plan(CONFIG, 0.3, uniform=True, shape=SHAPE)
    dear = equal_pairs(plan, SHAPE, sensitivity([0.1] * LAYERS, [9.0] * LAYERS), (2, 1))[0]
    cheap = equal_pairs(plan, SHAPE, sensitivity([9.0] * LAYERS, [0.1] * LAYERS), (2, 1))[0]
    assert (dear.heads, cheap.heads) == (2, 1)
    assert plan_of_pair(plan, SHAPE, dear).uniform
    assert plan_of_pair(plan, SHAPE, cheap).achieved == pytest.approx(0.3, abs=0.005)


# Targets in steps


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.6), st.sampled_from(sorted(LARGE)))
def test_equal_layers_meet_the_target_in_the_largest_step_that_can(ratio, width):
    config, shape = LARGE[width]
    asked = make_config(ratio=ratio, uniform=True)
    plan = plan_for(config, asked, shape)
    assert plan.uniform
    assert stock_config(config, plan.layers[0]) is not None
    assert abs(plan.achieved - ratio) <= EQUAL_TOLERANCE
    assert plan.layers[0]["intermediate_size"] % plan.round_to == 0
    assert preferred_step(asked, shape) == 64
    if plan.round_to < 64:
        assert f"multiples of {plan.round_to}" in (why_not_nearer(asked, shape, plan) or "")
        layer, step = shape.layers[0], 2 * plan.round_to
        for heads in (1, 2, 3):  # no pair of the step above is near enough
            removed = (3 - heads) * layer.unit_parameters["query"]
            nearest = min(
                abs(removed + (width - channels) * layer.unit_parameters["ffn"] - ratio * layer.parameters)
                for channels in range(step, width + 1, step)
            )
            assert nearest > EQUAL_TOLERANCE * layer.parameters or stock_config(
                config, {"num_attention_heads": 3 * heads, "num_key_value_heads": 3, "intermediate_size": width}
            ) is None  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    st.floats(0.03, 0.6),
    st.sampled_from(sorted(LARGE)),
    st.sampled_from(["log_increase", "uniform"]),
    st.lists(st.floats(1e-3, 1.0), min_size=12, max_size=12),
)
def test_widths_by_layer_are_aligned_and_meet_the_target(ratio, width, schedule, scales):
    config, shape = LARGE[width]
    asked = make_config(ratio=ratio, schedule=schedule)
    step = 64 if width >= 4096 else 32
    plan = plan_for(config, asked, shape)
    assert abs(plan.achieved - ratio) <= TOLERANCE
    assert preferred_step(asked, shape) == step
    costs = sensitivity(scales[:6], scales[6:])
    cheapest = allocate_budget(plan, shape, costs, plan.round_to)
    for each in (plan, cheapest, interpolate(plan, cheapest, shape, 1 - ratio, plan.round_to)):
        assert abs(each.achieved - ratio) <= 2 * TOLERANCE  # measured plans start from what the plan removes
        assert all(sizes["intermediate_size"] % plan.round_to == 0 for sizes in each.layers)
        assert each.round_to == plan.round_to
    if plan.round_to < step:  # only where six layers cannot mix the step finely enough
        assert step * shape.layers[0].unit_parameters["ffn"] > TOLERANCE * shape.layer_parameters


def test_who_gets_aligned_widths():
    _, shape = LARGE[1536]
    for given_, step in (
        ({}, 32),
        ({"round_to": 1}, 1),
        ({"round_to": "8"}, 8),
        ({"uniform": True}, 64),
        ({"method": "paper"}, 1),
        ({"method": "wanda", "uniform": True}, 1),
        ({"ratio": None, "kv_cache": "1GB@32k"}, 1),
    ):
        assert preferred_step(make_config(**{"ratio": 0.2, **given_}), shape) == step
    assert preferred_step(make_config(ratio=0.2), describe(large(1023, 2))) == 1
    assert preferred_step(make_config(ratio=0.2), describe(large(4096, 2))) == 64
    tiny = plan_for(CONFIG, make_config(ratio=0.3, allocation="schedule"), SHAPE)
    assert dataclasses.replace(tiny, round_to=1) == tiny
    assert math.gcd(*(sizes["intermediate_size"] for sizes in tiny.layers)) == 1


def test_the_paper_has_widths_of_its_own():
    config, shape = LARGE[1536]
    published = make_plan(config, 0.2, None, "kv", shape=shape)
    assert plan_for(config, make_config(ratio=0.2, method="paper"), shape).layers == published.layers
    assert any(sizes["intermediate_size"] % 32 for sizes in published.layers)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 0.6), st.sampled_from(sorted(LARGE)), st.booleans())
def test_a_limit_of_parameters_is_never_exceeded_in_steps(share, width, uniform):
    config, shape = LARGE[width]
    limit = int(shape.parameters - share * shape.layer_parameters)
    plan = plan_for(config, make_config(params=limit, uniform=uniform), shape)
    assert plan.parameters <= limit
    assert limit - plan.parameters <= (EQUAL_TOLERANCE if uniform else TOLERANCE) * shape.layer_parameters
    assert all(sizes["intermediate_size"] % plan.round_to == 0 for sizes in plan.layers)
