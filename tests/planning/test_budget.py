"""A budget is spent where it costs least, exactly as much of it as was asked for."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig

from slimgpt.models.shape import describe
from slimgpt.planning import Curve, Sensitivity, make_plan, spend
from slimgpt.planning.budget import _cheapest, _options

LAYERS = 4
CONFIG = MistralConfig(
    hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=3, intermediate_size=100,
    head_dim=8, vocab_size=50,
)  # fmt: skip
SHAPE = describe(CONFIG)


def sensitivity(scales: list[float], heads: list[float], joint: dict[str, Curve] | None = None) -> Sensitivity:
    """Convex costs, a scale per layer."""
    ffn = [Curve(i, "ffn", (0.25, 0.5, 0.75), (s, 3 * s, 9 * s)) for i, s in enumerate(scales)]
    query = [Curve(i, "query", (0.5,), (s,)) for i, s in enumerate(heads)]
    return Sensitivity((*ffn, *query), joint or {})


costs = st.lists(st.floats(1e-4, 1.0), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=40, deadline=None)
@given(costs, costs, st.floats(0.05, 0.5), st.sampled_from([1, 4]))
def test_as_much_is_removed_as_the_plan_says(ffn, heads, ratio, round_to):
    plan = make_plan(CONFIG, ratio, shape=SHAPE, round_to=round_to)
    spent = spend(plan, SHAPE, sensitivity(ffn, heads), round_to)
    step = round_to * SHAPE.layers[0].unit_parameters["ffn"]
    assert 0 <= plan.parameters - spent.parameters < max(step, 0.002 * SHAPE.layer_parameters)
    for sizes in spent.layers:
        assert sizes["intermediate_size"] % round_to == 0
        assert sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0


@settings(max_examples=25, deadline=None)
@given(costs, costs, st.floats(0.1, 0.5))
def test_no_other_choice_that_removes_as_much_costs_less(ffn, heads, ratio):
    found = sensitivity(ffn, heads)
    options = _options(SHAPE, found.curves, "query", 25, None)  # coarse: four widths, two numbers of heads
    target = int(ratio * SHAPE.layer_parameters)
    chosen = _cheapest(options, target, {"ffn": 1.0, "query": 1.0})
    assert chosen is not None
    removed, cost = sum(o.removed for o in chosen.values()), sum(o.cost for o in chosen.values())
    best = min(
        sum(o.cost for o in pick) for pick in product(*options.values()) if sum(o.removed for o in pick) >= removed
    )
    assert removed >= target
    assert cost == pytest.approx(best, rel=1e-9)


def test_a_dear_layer_loses_less():
    plan = make_plan(CONFIG, 0.3, shape=SHAPE)
    spent = spend(plan, SHAPE, sensitivity([1.0, 0.1, 0.1, 1.0], [0.5] * LAYERS))
    widths = [sizes["intermediate_size"] for sizes in spent.layers]
    assert max(widths[1], widths[2]) < min(widths[0], widths[3])


def test_equal_costs_give_equal_widths():
    plan = make_plan(CONFIG, 0.3, shape=SHAPE)
    widths = [sizes["intermediate_size"] for sizes in spend(plan, SHAPE, sensitivity([0.1] * 4, [9.0] * 4)).layers]
    assert max(widths) - min(widths) <= 1


def test_heads_that_stand_in_for_each_other_are_dearer():
    plan = make_plan(CONFIG, 0.3, shape=SHAPE)
    alone = sensitivity([0.1] * 4, [0.01] * 4)
    joint = sensitivity([0.1] * 4, [0.01] * 4, {"query": Curve(-1, "query", (0.5,), (4.0,))})
    assert joint.dearer("query", 0.04) == pytest.approx(100)
    assert joint.dearer("ffn", 0.4) == 1.0

    def heads(costs):
        return sum(sizes["num_attention_heads"] for sizes in spend(plan, SHAPE, costs).layers)

    assert heads(alone) < heads(joint)


def test_joint_cost_is_a_power_of_the_sum_between_its_points():
    ffn = Curve(-1, "ffn", (0.25, 0.5, 0.75), (0.1, 0.9, 8.1))  # nine times for three: the square
    found = sensitivity([0.025] * 4, [0.1] * 4, {"ffn": ffn})  # sums 0.1, 0.3, 0.9
    for total in (0.1, 0.2, 0.5):
        assert found.dearer("ffn", total) == pytest.approx(2 * 10 * total)


def test_curves_pass_through_what_was_measured():
    curve = Curve(0, "ffn", (0.25, 0.5, 0.75), (0.01, 0.03, 0.07))
    assert curve.at(0) == 0
    for share, cost in zip(curve.removed, curve.cost):
        assert curve.at(share) == pytest.approx(cost)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_curves_grow_faster_than_the_share_whatever_was_measured(measured):
    curve = Curve(0, "ffn", (0.25, 0.5, 0.75)[: len(measured)], tuple(measured))
    per_share = [curve.at(x / 100) / x for x in range(1, 91)]
    assert per_share == sorted(per_share)


def test_what_cannot_be_spent_leaves_the_plan_as_it_is():
    plan = make_plan(CONFIG, 0.5, shape=SHAPE)
    few = Sensitivity((Curve(0, "ffn", (0.5,), (0.1,)),), {})
    assert spend(plan, SHAPE, few) is plan
