"""Widths in a few steps: against every division of the layers there is, and within what is asked for."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.config import make_config
from slimgpt.errors import PlanError, UsageError
from slimgpt.models import describe
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.planning import StructureCost, allocate_budget, make_plan
from slimgpt.planning.alignment import EQUAL_TOLERANCE
from slimgpt.planning.allocation import POWERS
from slimgpt.planning.budget import parameters_of, removed_by
from slimgpt.planning.few_widths import _groups, in_few_widths, widths_text
from slimgpt.planning.plan import plan_of_widths
from slimgpt.planning.planner import plan_for
from slimgpt.planning.restriction import restricted
from slimgpt.planning.speed_plan import plan_for_speed
from slimgpt.planning.speed_table import SpeedTarget
from slimgpt.sensitivity.allocate import allocated
from tests.golden import tiny_mixture
from tests.models.families import grouped_config
from tests.planning.speed_tables import table_of
from tests.planning.test_equal_widths import large, sensitivity

LAYERS = 8
CONFIG = grouped_config(LAYERS)
SHAPE = describe(CONFIG)
WIDE = SHAPE.layers[0].sizes[CHANNELS]
costs = st.lists(st.floats(1e-3, 1.0), min_size=LAYERS, max_size=LAYERS)


def ffn_widths(plan) -> list[int]:
    return [sizes[CHANNELS] for sizes in plan.layers]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(3, 12), min_size=5, max_size=5), st.floats(0.01, 1.0), st.integers(1, 3))
def test_groups_lose_least_of_all_divisions(planned, scale, count):
    """Every choice of widths, every layer in the cheapest of them; losses are heights above the tangent."""
    size, power = 12, POWERS["ffn"]
    measured = {(i, "ffn"): StructureCost(i, "ffn", 0.5, scale) for i in range(5)}  # alike: an order is the best one
    groups = _groups(
        dict(enumerate(planned)), dict.fromkeys(range(5), size), dict.fromkeys(range(5), 1), count, measured, "ffn"
    )

    def loss(width: int, wish: int) -> float:
        def cost(kept: int) -> float:
            return scale * ((1 - kept / size) / 0.5) ** power

        slope = -scale * power / 0.5**power * (1 - wish / size) ** (power - 1) / size
        return cost(width) - cost(wish) - slope * (width - wish)

    best = min(
        sum(min(loss(width, wish) for width in chosen) for wish in planned)
        for number in range(1, count + 1)
        for chosen in combinations(range(1, size + 1), number)
    )
    assert len(groups) <= count
    assert sorted(i for group in groups for i in group.layers) == list(range(5))
    assert sum(loss(group.width, planned[i]) for group in groups for i in group.layers) == pytest.approx(best, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(costs, costs, st.floats(0.1, 0.5), st.integers(2, 5), st.sampled_from([1, 4]))
def test_few_widths_remove_as_much(ffn, heads, ratio, count, round_to):
    measured = sensitivity(ffn, heads, heads_removed=0.5)
    scheduled = make_plan(CONFIG, ratio, round_to=round_to, shape=SHAPE)
    free = allocate_budget(scheduled, SHAPE, measured, round_to)
    for plan, known in ((scheduled, None), (free, measured)):
        few = in_few_widths(plan, SHAPE, count, known)
        assert len(set(ffn_widths(few))) <= count
        assert len({sizes[HEADS] for sizes in few.layers}) <= count
        assert all(width % round_to == 0 for width in ffn_widths(few))
        assert few.achieved >= ratio - 1e-9
        step = round_to * SHAPE.layers[0].unit_parameters["ffn"] / SHAPE.layer_parameters
        assert few.achieved - ratio < LAYERS * step
        assert (few.ratio, few.round_to) == (plan.ratio, round_to)


def test_as_many_widths_as_layers_leave_the_plan_as_it_is():
    plan = make_plan(CONFIG, 0.3, round_to=4, shape=SHAPE)
    few = in_few_widths(plan, SHAPE, LAYERS, budget=parameters_of(plan, SHAPE))
    assert few == plan
    assert in_few_widths(plan, SHAPE, None) is plan


def test_a_layer_that_costs_more_stays_wider():
    dear = [1.0 if index in (2, 5) else 0.01 for index in range(LAYERS)]
    measured = sensitivity(dear, [1.0] * LAYERS, heads_removed=0.5)
    config = make_config(ratio=0.3, num_widths=2)
    scheduled = plan_for(CONFIG, config, SHAPE)
    chosen, candidates, _ = allocated(scheduled, SHAPE, measured, config, CONFIG)
    assert candidates == [scheduled, chosen]
    narrow, wide = sorted(set(ffn_widths(chosen)))
    assert [index for index, width in enumerate(ffn_widths(chosen)) if width == wide] == [2, 5]
    assert f"FFN channels {narrow} (6), {wide} (2); heads" in widths_text(chosen)
    assert 0 <= chosen.achieved - 0.3 <= EQUAL_TOLERANCE


def test_the_step_of_widths_is_kept_and_the_target_is_met():
    config, model = make_config(ratio=0.2, num_widths=3), large(layers=12)
    plan = plan_for(model, config, describe(model))
    assert plan.round_to == 32
    assert len(set(ffn_widths(plan))) <= 3
    assert all(width % 32 == 0 for width in ffn_widths(plan))
    assert 0 <= plan.achieved - 0.2 <= EQUAL_TOLERANCE


def test_what_is_kept_is_no_width_that_counts():
    config = make_config(ratio=0.2, num_widths=2, skip_layers="0,-1")
    shape = restricted(SHAPE, config)
    plan = plan_for(CONFIG, config, shape)
    assert plan.layers[0] == plan.layers[-1] == SHAPE.layers[0].sizes
    assert len(set(ffn_widths(plan)[1:-1])) <= 2


def test_a_limit_is_not_exceeded_and_a_cache_keeps_its_heads():
    limit = round(0.8 * SHAPE.parameters)
    plan = plan_for(CONFIG, make_config(params=limit, num_widths=2), SHAPE)
    assert plan.parameters <= limit
    assert len(set(ffn_widths(plan))) <= 2
    cached = {"ratio": 0.3, "kv_cache": "9KB@16"}
    few, free = (plan_for(CONFIG, make_config(**cached, **more), SHAPE) for more in ({"num_widths": 2}, {}))
    assert [sizes[KV_HEADS] for sizes in few.layers] == [sizes[KV_HEADS] for sizes in free.layers]
    assert len(set(ffn_widths(few))) <= 2


def test_an_attention_that_is_gone_stays_gone():
    layers = [
        {**sizes, HEADS: 0, KV_HEADS: 0} if index in (3, 6) else sizes
        for index, sizes in enumerate(make_plan(CONFIG, 0.3, shape=SHAPE).layers)
    ]
    plan = plan_of_widths(SHAPE, [dict(sizes) for sizes in layers], "query")
    few = in_few_widths(plan, SHAPE, 2)
    assert [index for index, sizes in enumerate(few.layers) if not sizes[HEADS]] == [3, 6]


def test_a_speed_is_promised_in_few_widths():
    table = table_of(
        CONFIG,
        lambda h, c: 1e-4 + 4e-4 * h / SHAPE.layers[0].sizes[HEADS] + 5e-4 * c / WIDE,
        heads=(3,),
        channels=(WIDE // 2, WIDE // 4),
    )
    target = SpeedTarget(table, 1.3)
    config = make_config(speedup=1.3, prompt=16, new_tokens=4, num_widths=2)
    plan = plan_for_speed(CONFIG, config, SHAPE, target)
    measured = sensitivity([0.1, 0.9] * (LAYERS // 2), [0.5] * LAYERS, heads_removed=0.5)
    chosen, _, _ = allocated(plan, SHAPE, measured, config, CONFIG, budget=target.budget(SHAPE))
    for each in (plan, chosen):
        assert removed_by(target.budget(SHAPE), each.layers) >= target.budget(SHAPE).target
        assert target.promised(SHAPE, each.layers) < 1.4
        assert len(set(ffn_widths(each))) <= 2


def test_mixtures_equal_layers_and_plan_files_are_refused():
    model = tiny_mixture()
    with pytest.raises(PlanError, match="experts of a mixture"):
        plan_for(model.config, make_config(ratio=0.2, num_widths=2), describe(model.config, model))
    for more, message in (
        ({"num_widths": 1}, "at least 2"),
        ({"num_widths": 2, "uniform": True}, "uniform keeps them equal"),
        ({"num_widths": 2, "plan": "plan.toml"}, "num_widths"),
    ):
        with pytest.raises(UsageError, match=message):
            make_config(**more)
