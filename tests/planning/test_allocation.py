"""A budget is spent where it costs least, exactly as much of it as was asked for."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.models.parameter_counts import describe
from slimgpt.planning import Sensitivity, StructureCost, allocate_budget, interpolate, make_plan, trial_plan
from slimgpt.planning.allocation import FLOOR, _options, cheapest_options
from slimgpt.planning.budget import ParameterBudget
from tests.models.families import grouped_config

LAYERS = 4
CONFIG = grouped_config(LAYERS)
SHAPE = describe(CONFIG)


def sensitivity(scales: list[float], heads: list[float]) -> Sensitivity:
    """A cost per layer at 40% of the channels and at one of three query heads."""
    ffn = [StructureCost(i, "ffn", 0.4, s) for i, s in enumerate(scales)]
    query = [StructureCost(i, "query", 1 / 3, s) for i, s in enumerate(heads)]
    return Sensitivity(sum(scales) + sum(heads), (*ffn, *query))


costs = st.lists(st.floats(1e-4, 1.0), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=40, deadline=None)
@given(costs, costs, st.floats(0.05, 0.5), st.sampled_from([1, 4]))
def test_as_much_is_removed_as_the_plan_says(ffn, heads, ratio, round_to):
    plan = make_plan(CONFIG, ratio, shape=SHAPE, round_to=round_to)
    spent = allocate_budget(plan, SHAPE, sensitivity(ffn, heads), round_to)
    step = round_to * SHAPE.layers[0].unit_parameters["ffn"]
    assert 0 <= plan.parameters - spent.parameters < max(step, 0.002 * SHAPE.layer_parameters)
    for sizes in spent.layers:
        assert sizes["intermediate_size"] % round_to == 0
        assert sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0


@settings(max_examples=40, deadline=None)
@given(costs, costs, st.floats(0.05, 0.5), st.floats(0, 1), st.sampled_from([1, 4]))
def test_a_plan_between_two_removes_as_much(ffn, heads, ratio, share, round_to):
    plan = make_plan(CONFIG, ratio, shape=SHAPE, round_to=round_to)
    spent = allocate_budget(plan, SHAPE, sensitivity(ffn, heads), round_to)
    blended = interpolate(plan, spent, SHAPE, share, round_to)
    step = round_to * SHAPE.layers[0].unit_parameters["ffn"]
    assert 0 <= plan.parameters - blended.parameters < max(step, 0.002 * SHAPE.layer_parameters)
    if blended == spent:
        return
    # A head is rounded by half of one; as many parameters are made up for in channels, evenly.
    slack = (SHAPE.layers[0].unit_parameters["query"] // (2 * step) + 2) * round_to
    for one, two, middle in zip(plan.layers, spent.layers, blended.layers):
        assert middle["intermediate_size"] % round_to == 0
        for name in one:
            low, high = sorted((one[name], two[name]))
            more = slack if name == "intermediate_size" else 0
            assert low - more <= middle[name] <= high + more


def test_the_ends_of_the_way_are_the_plans():
    plan = make_plan(CONFIG, 0.3, shape=SHAPE)
    spent = allocate_budget(plan, SHAPE, sensitivity([1.0, 0.1, 0.1, 1.0], [0.5] * LAYERS))
    assert interpolate(plan, spent, SHAPE, 0.0).layers == plan.layers != spent.layers
    assert interpolate(plan, spent, SHAPE, 1.0).layers == spent.layers


@settings(max_examples=25, deadline=None)
@given(costs, costs, st.floats(0.1, 0.5))
def test_no_other_choice_that_removes_as_much_costs_less(ffn, heads, ratio):
    costs = sensitivity(ffn, heads)
    options = _options(
        SHAPE, costs.with_floor(), "query", 25, None, ParameterBudget(SHAPE, 0)
    )  # coarse: four widths, two numbers of heads
    target = int(ratio * SHAPE.layer_parameters)
    chosen = cheapest_options(options, target)
    assert chosen is not None
    removed, cost = sum(o.removed for o in chosen.values()), sum(o.cost for o in chosen.values())
    best = min(
        sum(o.cost for o in pick) for pick in product(*options.values()) if sum(o.removed for o in pick) >= removed
    )
    assert removed >= target
    assert cost == pytest.approx(best, rel=1e-9)


def test_a_dear_layer_loses_less():
    plan = make_plan(CONFIG, 0.3, shape=SHAPE)
    spent = allocate_budget(plan, SHAPE, sensitivity([1.0, 0.1, 0.1, 1.0], [0.5] * LAYERS))
    widths = [sizes["intermediate_size"] for sizes in spent.layers]
    assert max(widths[1], widths[2]) < min(widths[0], widths[3])


def test_equal_costs_give_equal_widths():
    plan = make_plan(CONFIG, 0.3, shape=SHAPE)
    widths = [
        sizes["intermediate_size"] for sizes in allocate_budget(plan, SHAPE, sensitivity([0.1] * 4, [9.0] * 4)).layers
    ]
    assert max(widths) - min(widths) <= 1


def test_costs_pass_through_what_was_measured_and_grow_faster_than_the_share():
    for unit in ("ffn", "query", "kv"):
        cost = StructureCost(0, unit, 0.4, 0.02)
        assert cost.at(0) == 0
        assert cost.at(0.4) == pytest.approx(0.02)
        per_share = [cost.at(x / 100) / x for x in range(1, 101)]
        assert per_share == sorted(per_share)


def test_what_is_too_small_to_be_believed_is_raised():
    costs = {
        (c.layer, c.unit): c.cost for c in sensitivity([-0.1, 0.2, 0.3, 0.4], [0.01, 0.02, 0.02, 0.02]).with_floor()
    }
    assert costs[0, "ffn"] == pytest.approx(FLOOR * 0.25)
    assert [costs[i, "ffn"] for i in (1, 2, 3)] == [0.2, 0.3, 0.4]
    assert costs[0, "query"] == 0.01


@settings(max_examples=40, deadline=None)
@given(st.floats(0.05, 0.5))
def test_a_trial_narrows_everything_and_removes_about_as_much(ratio):
    plan = make_plan(CONFIG, ratio, shape=SHAPE)
    tried = trial_plan(plan, SHAPE)
    for layer, sizes in zip(SHAPE.layers, tried.layers):
        assert 0 < sizes["intermediate_size"] < layer.sizes["intermediate_size"]
        assert 0 < sizes["num_attention_heads"] < layer.sizes["num_attention_heads"]
        assert sizes["num_key_value_heads"] == layer.sizes["num_key_value_heads"]
    if ratio >= 0.2:  # one head of three is a lot of less
        assert tried.achieved == pytest.approx(plan.achieved, abs=0.01)
    fixed = trial_plan(plan, SHAPE, heads=False)
    assert [sizes["num_attention_heads"] for sizes in fixed.layers] == [
        sizes["num_attention_heads"] for sizes in plan.layers
    ]


def test_what_cannot_be_spent_leaves_the_plan_as_it_is():
    plan = make_plan(CONFIG, 0.5, shape=SHAPE)
    few = Sensitivity(0.1, (StructureCost(0, "ffn", 0.5, 0.1),))
    assert allocate_budget(plan, SHAPE, few) is plan
