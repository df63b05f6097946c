"""A target in speed: times between those measured, the cheapest widths that save enough, and what cannot be reached."""

from __future__ import annotations

import json
import re
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.config import make_config
from slimgpt.errors import PlanError, UsageError
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.parameter_counts import describe
from slimgpt.pipeline.speed_target import planned
from slimgpt.planning import Sensitivity, StructureCost, allocate_budget, interpolate, make_plan
from slimgpt.planning.allocation import _options, cheapest_options, predicted_cost
from slimgpt.planning.budget import ParameterBudget, adjust_to_target, removed_by
from slimgpt.planning.equal_widths import equal_pairs, plan_of_pair
from slimgpt.planning.plan import plan_of_widths, with_heads
from slimgpt.planning.restriction import restricted
from slimgpt.planning.speed_plan import plan_for_speed
from slimgpt.planning.speed_table import Curve, SpeedTable, SpeedTarget, TimeBudget, mismatch, read_table, table_model
from tests.golden import tiny_mixture
from tests.models.families import grouped_config
from tests.planning.speed_tables import table_of

LAYERS = 4
CONFIG = grouped_config(LAYERS)
SHAPE = describe(CONFIG)
DENSE = SHAPE.layers[0].sizes
GROUP = DENSE[HEADS] // DENSE[KV_HEADS]
HEAD_GRID = tuple(DENSE[KV_HEADS] * kept for kept in range(GROUP - 1, 0, -1))
WIDE = DENSE[CHANNELS]
WIDTHS = tuple(WIDE * share // 8 for share in (6, 4, 2))


def linear(heads: int, channels: int) -> float:
    """Seconds of a layer: attention costs more for its parameters than the FFN."""
    return 1e-4 + 4e-4 * heads / DENSE[HEADS] + 5e-4 * channels / WIDE


TABLE = table_of(CONFIG, linear, heads=HEAD_GRID, channels=WIDTHS)


def sensitivity(ffn: list[float], heads: list[float]) -> Sensitivity:
    """A cost per layer at 40% of the channels and at one unit of query heads."""
    channels = [StructureCost(i, "ffn", 0.4, s) for i, s in enumerate(ffn)]
    query = [StructureCost(i, "query", 1 / GROUP, s) for i, s in enumerate(heads)]
    return Sensitivity(sum(ffn) + sum(heads), (*channels, *query))


def plan(speedup: float, table: SpeedTable = TABLE, **more):
    config = make_config(speedup=speedup, prompt=16, new_tokens=4, **more)
    return plan_for_speed(CONFIG, config, restricted(SHAPE, config), SpeedTarget(table, speedup))


costs = st.lists(st.floats(1e-4, 1.0), min_size=LAYERS, max_size=LAYERS)
times = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


# Times


@given(times)
def test_the_curve_is_the_nearest_that_does_not_descend(seconds):
    curve = Curve.fitted(list(enumerate(seconds)))
    number = range(len(seconds))

    def mean(first: int, last: int) -> float:
        return sum(seconds[first : last + 1]) / (last - first + 1)

    # The closed form of isotonic regression.
    nearest = [max(min(mean(j, k) for k in number if k >= i) for j in number if j <= i) for i in number]
    assert curve.times == pytest.approx(nearest)


def test_what_is_between_two_widths_lies_on_the_line_between_their_times():
    assert TABLE.layer_seconds(0, DENSE) == pytest.approx(linear(DENSE[HEADS], WIDE))
    sizes = {**DENSE, HEADS: HEAD_GRID[0], CHANNELS: (WIDTHS[0] + WIDTHS[1]) // 2}
    assert TABLE.layer_seconds(2, sizes) == pytest.approx(linear(sizes[HEADS], sizes[CHANNELS]))
    assert TABLE.model_seconds([DENSE] * LAYERS) == pytest.approx(1e-3 + LAYERS * linear(DENSE[HEADS], WIDE))


@given(st.integers(1, GROUP), st.integers(1, WIDE), st.integers(1, WIDE))
def test_time_is_added_up_over_structures_and_never_grows_with_less(heads, one, two):
    budget = TimeBudget(TABLE, SHAPE, 0)
    narrow, wide = sorted((one, two))
    assert budget.of_structure(1, "ffn", narrow) >= budget.of_structure(1, "ffn", wide) >= 0
    sizes = with_heads(SHAPE.layers[1], "query", heads, {CHANNELS: narrow})
    parts = budget.of_structure(1, "query", heads) + budget.of_structure(1, "ffn", narrow)
    assert budget.of_layer(1, sizes) == parts


@given(st.floats(WIDTHS[-1] + 1, WIDE - 1))
def test_the_width_for_a_time_is_the_one_that_saves_it(channels):
    budget = TimeBudget(TABLE, SHAPE, 0)
    exact = 1e9 * (linear(DENSE[HEADS], WIDE) - linear(DENSE[HEADS], channels))
    assert budget.channels_for(0, exact) == pytest.approx(channels, abs=1e-2)


def test_a_table_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "table.json"
    file.write_text(json.dumps(TABLE.to_json()))
    assert read_table(file).to_json() == TABLE.to_json()
    assert problem(PROTOCOL, table=read_table(file)) is None


def problem(protocol, *, table=TABLE, model=None, head_unit="query", layers=None):
    layers = layers or [layer.sizes for layer in SHAPE.layers]
    return mismatch(table, model or table_model(CONFIG), head_unit, protocol, layers=layers)


PROTOCOL = {"on": "transformers", "batch": 1, "prompt": 16, "new_tokens": 4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rest": {"prompt": -1.0, "token": 0.0}}, "no number of 0 or more"),
        ({"rest": {"prompt": float("nan"), "token": 0.0}}, "no number of 0 or more"),
        ({"rest": {"prompt": "1", "token": 0.0}}, "no number of 0 or more"),
        ({"rest": {"prompt": 1.0}}, "token"),
        ({"kinds": []}, "no times"),
        ({"kinds": 3}, "lacks or is unknown"),
        ({"speed": 3}, "speed"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path, change, message):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({**TABLE.to_json(), **change}))
    with pytest.raises(PlanError, match=message):
        read_table(file)
    file.write_text("[1]")
    with pytest.raises(PlanError, match="no JSON object"):
        read_table(file)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(PlanError, match=r"speed table .*table\.json: it does not exist, or is no regular file"):
        read_table(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"on": "vllm"}, "on transformers, and vllm"),
        ({"batch": 8}, "batch 1, and 8"),
        ({"prompt": 512}, "prompt 16, and 512"),
        ({"new_tokens": 128}, "new_tokens 4, and 128"),
    ],
)
def test_a_table_for_something_else_is_refused(change, message):
    assert message in str(problem({**PROTOCOL, **change}))
    assert "removed by 'query'" in str(problem(PROTOCOL, head_unit="kv"))
    assert "hidden_size" in str(problem(PROTOCOL, model={**table_model(CONFIG), "hidden_size": 7}))


@pytest.mark.parametrize(("field", "name"), [(HEADS, "heads"), (KV_HEADS, "kv_heads"), (CHANNELS, "channels")])
def test_a_table_for_other_widths_is_refused(field, name):
    """Llama 2 and 3 of 7 and 8 billion have the same hidden size and depth, and other FFNs and KV heads."""
    wider = [{**layer.sizes, field: 2 * layer.sizes[field]} for layer in SHAPE.layers]
    assert f"has {name} {DENSE[field]} at most, and this model's has {2 * DENSE[field]}" in str(
        problem(PROTOCOL, layers=wider)
    )


# Widths


@settings(max_examples=25, deadline=None)
@given(costs, costs, st.floats(0.1, 0.5), st.floats(0.1, 10.0))
def test_no_other_choice_that_saves_as_much_time_costs_less(ffn, heads, share, dear):
    table = table_of(
        CONFIG, lambda h, c: 1e-4 + dear * 1e-3 * h / DENSE[HEADS] + 1e-3 * c / WIDE, heads=HEAD_GRID, channels=WIDTHS
    )
    budget = TimeBudget(table, SHAPE, 0)
    target = share * budget.total
    measured = sensitivity(ffn, heads)
    options = _options(SHAPE, measured.with_floor(), "query", 25, None, budget)
    chosen = cheapest_options(options, target)
    assert chosen is not None
    saved, cost = sum(o.removed for o in chosen.values()), sum(o.cost for o in chosen.values())
    assert saved >= target
    best = min(
        sum(o.cost for o in pick) for pick in product(*options.values()) if sum(o.removed for o in pick) >= saved
    )
    assert cost <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=40, deadline=None)
@given(costs, costs, st.floats(1.05, 1.6), st.sampled_from([1, 4]), st.floats(0, 1))
def test_the_time_is_saved_and_hardly_more_in_aligned_widths(ffn, heads, speedup, round_to, share):
    budget = SpeedTarget(TABLE, speedup).budget(SHAPE)
    given_plan = plan(speedup, round_to=round_to)
    measured = sensitivity(ffn, heads)
    cheapest = allocate_budget(given_plan, SHAPE, measured, round_to, budget=budget)
    mixed = interpolate(given_plan, cheapest, SHAPE, share, round_to, budget=budget)
    step = 1e9 * 5e-4 * round_to / WIDE
    for each in (given_plan, cheapest, mixed):
        saved = removed_by(budget, each.layers)
        assert saved >= budget.target
        assert SpeedTarget(TABLE, speedup).promised(SHAPE, each.layers) >= speedup * (1 - 1e-6)
        assert all(sizes[CHANNELS] % round_to == 0 for sizes in each.layers)
        # Whole heads alone may save more than was asked for: no channel can come back that has not gone.
        narrowed = any(sizes[CHANNELS] < WIDE for sizes in each.layers)
        excess = removed_by(budget, each.layers) - budget.target
        if each is mixed and narrowed:
            assert excess < max(step, 0.003 * budget.total) + 0.002 * budget.total
        if each is cheapest is not given_plan and narrowed:
            assert excess <= step + 0.002 * budget.total + LAYERS


@settings(max_examples=20, deadline=None)
@given(costs, costs, st.floats(0.05, 0.4), st.floats(0, 1))
def test_times_that_are_parameters_give_the_plan_of_parameters(ffn, heads, ratio, share):
    each = 1e-9  # a nanosecond per parameter
    units = SHAPE.layers[0].unit_parameters
    table = table_of(
        CONFIG,
        lambda h, c: each * (units["query"] * h / DENSE[KV_HEADS] + units["ffn"] * c + 1000),
        heads=HEAD_GRID,
        channels=(1,),
    )
    scheduled = make_plan(CONFIG, ratio, shape=SHAPE)
    target = scheduled.parameters_before - scheduled.parameters
    measured = sensitivity(ffn, heads)
    plans = []
    for budget in (ParameterBudget(SHAPE, target), TimeBudget(table, SHAPE, target)):
        cheapest = allocate_budget(scheduled, SHAPE, measured, budget=budget)
        plans.append((cheapest.layers, interpolate(scheduled, cheapest, SHAPE, share, budget=budget).layers))
    assert plans[0][0] == plans[1][0]
    assert plans[0] == plans[1]


def test_what_takes_long_and_says_little_goes_first():
    slow_heads = table_of(
        CONFIG, lambda h, c: 1e-3 * h / DENSE[HEADS] + 1e-4 * c / WIDE, heads=HEAD_GRID, channels=(1,)
    )
    slow_ffn = table_of(CONFIG, lambda h, c: 1e-4 * h / DENSE[HEADS] + 1e-3 * c / WIDE, heads=HEAD_GRID, channels=(1,))
    measured, kept = sensitivity([0.1] * LAYERS, [0.1] * LAYERS), []
    for table in (slow_heads, slow_ffn):
        budget = SpeedTarget(table, 1.224).budget(SHAPE)
        spent = allocate_budget(plan(1.224, table), SHAPE, measured, budget=budget)
        kept.append([sum(sizes[name] for sizes in spent.layers) for name in (HEADS, CHANNELS)])
    (heads_slow, channels_slow), (heads_fast, channels_fast) = kept
    assert heads_slow < heads_fast
    assert channels_slow > channels_fast


@settings(max_examples=15, deadline=None)
@given(costs, costs, st.floats(1.1, 1.8))
def test_measured_widths_cost_no_more_than_those_of_the_schedule(ffn, heads, speedup):
    budget, scheduled = SpeedTarget(TABLE, speedup).budget(SHAPE), plan(speedup)
    measured = sensitivity(ffn, heads)
    spent = allocate_budget(scheduled, SHAPE, measured, budget=budget)
    slack = 1.1  # the Lagrange multiplier meets a little more than the target, and the rest is given back as channels
    assert predicted_cost(spent, SHAPE, measured) <= slack * predicted_cost(scheduled, SHAPE, measured)


# Targets


@pytest.mark.parametrize("more", [{}, {"uniform": True}, {"round_to": 4}, {"schedule": "uniform"}, {"ffn_only": True}])
def test_a_speed_is_promised_and_hardly_exceeded(more):
    before = None
    for speedup in (1.1, 1.25, 1.4):
        made = plan(speedup, **more)
        promised = SpeedTarget(TABLE, speedup).promised(SHAPE, made.layers)
        assert speedup <= promised * (1 + 1e-9)
        assert promised < speedup * (
            1.1 if "uniform" in more or "schedule" in more else 1.02
        )  # all layers change at once
        assert made.ratio == made.achieved
        assert before is None or made.parameters < before
        before = made.parameters


def test_the_largest_speed_is_said_where_more_is_asked_and_can_be_had():
    with pytest.raises(PlanError, match="the largest is") as refused:
        plan(40.0)
    largest = float(re.findall(r"largest is ([\d.]+)", str(refused.value))[0])
    assert 1.5 < largest < 40
    assert SpeedTarget(TABLE, largest).promised(SHAPE, plan(largest).layers) >= largest * (1 - 1e-9)


def test_a_width_that_saves_no_time_is_not_chosen():
    steps = (WIDE * 3 // 4, WIDE // 2, WIDE // 4)
    table = table_of(CONFIG, lambda h, c: 1e-4 * h / DENSE[HEADS] + 1e-3 * (c > WIDE // 2) + 1e-4, channels=steps)
    budget = SpeedTarget(table, 1.3).budget(SHAPE)
    base = plan(1.3, table, ffn_only=True)
    measured = sensitivity([0.1] * LAYERS, [0.1] * LAYERS)
    spent = allocate_budget(base, SHAPE, measured, heads=False, budget=budget)
    assert all(sizes[CHANNELS] >= WIDE // 2 for sizes in spent.layers)
    assert removed_by(budget, spent.layers) >= budget.target


def test_a_target_behind_a_flat_part_of_the_curve_is_met():
    steps = (WIDE * 3 // 4, WIDE // 2, WIDE // 4)
    table = table_of(CONFIG, lambda h, c: 1e-4 * h / DENSE[HEADS] + 1e-3 * (c > WIDE // 2) + 1e-4, channels=steps)
    layers = [dict(DENSE) for _ in range(LAYERS)]
    budget = TimeBudget(table, SHAPE, 5e5)  # nanoseconds; the first quarter of the channels saves nothing
    adjust_to_target(SHAPE, layers, 1, budget)
    assert 0 <= removed_by(budget, layers) - budget.target < 1e6 / (WIDE // 4) + 1
    assert all(sizes[CHANNELS] < steps[0] for sizes in layers)
    adjust_to_target(SHAPE, layers, 1, TimeBudget(table, SHAPE, 1e12))  # out of reach: as far as it saves time
    assert [sizes[CHANNELS] for sizes in layers] == [WIDE // 2] * LAYERS


def test_equal_layers_save_the_time_too():
    config = make_config(speedup=1.3, prompt=16, new_tokens=4, uniform=True)
    base, budget = plan(1.3, uniform=True), SpeedTarget(TABLE, 1.3).budget(SHAPE)
    measured = sensitivity([0.1] * LAYERS, [0.4] * LAYERS)
    pairs = equal_pairs(base, SHAPE, measured, range(GROUP, 0, -1), exceeding=True, budget=budget)
    assert config.uniform
    assert pairs
    for pair in pairs:
        made = plan_of_pair(base, SHAPE, pair)
        saved = removed_by(budget, made.layers)
        assert abs(saved - budget.target) / budget.total == pytest.approx(pair.error, abs=1e-6)
        assert saved >= budget.target or pair.channels == WIDE


def test_a_layer_without_attention_saves_its_row_of_no_heads():
    table = table_of(CONFIG, linear, heads=(*HEAD_GRID, 0), channels=WIDTHS)
    layers = [dict(DENSE), *({**DENSE, HEADS: 0, KV_HEADS: 0} for _ in range(LAYERS - 1))]
    saved = removed_by(TimeBudget(table, SHAPE, 0), plan_of_widths(SHAPE, layers, "query").layers)
    assert saved == pytest.approx(1e9 * 4e-4 * (LAYERS - 1))


def test_mixtures_are_refused():
    model = tiny_mixture()
    shape = describe(model.config, model)
    with pytest.raises(PlanError, match="mixture of experts"):
        plan_for_speed(model.config, make_config(speedup=1.2), shape, SpeedTarget(TABLE, 1.2))
    config = make_config(speedup=1.2, heads_only=True)  # its layers would be timed at widths of experts, too
    with pytest.raises(PlanError, match="mixture of experts"):
        planned(model.config, config, restricted(shape, config), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"speedup": 1.0}, "more than 1"),
        ({"speedup": float("inf")}, "more than 1"),
        ({"speedup": 1.5, "ratio": 0.2}, "ratio and speedup were given"),
        ({"speedup": 1.5, "params": "1M"}, "params and speedup were given"),
        ({"speedup": 1.5, "bytes": "1MB"}, "bytes and speedup were given"),
        ({"speedup": 1.5, "plan": "plan.toml"}, "speedup and plan were given"),
        ({"speedup": 1.5, "kv_cache": "1MB@1k"}, "speedup and kv_cache"),
        ({"speedup": 1.5, "schedule": (0.1, 0.2)}, "list of ratios"),
        ({"speedup": 1.5, "whole_experts": 0.5}, "whole experts"),
        ({"speedup": 1.5, "method": "reap"}, "whole experts"),
        ({"speedup": 1.5, "on": "onnx"}, "choose transformers, vllm, llama.cpp"),
        ({"speedup": 1.5, "batch": 0}, "at least 1"),
        ({"prompt": 16}, "add speedup"),
        ({"speed_table": "table.json"}, "add speedup"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given_settings, message):
    with pytest.raises(UsageError, match=message):
        make_config(**given_settings)
