"""The plan against parameters that are counted on models really built with its widths."""

import copy
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from slimgpt.errors import PlanError
from slimgpt.models import ARCHITECTURES, describe
from slimgpt.models.build import empty_model
from slimgpt.models.lookup import head_dim
from slimgpt.models.parameter_counts import count_tied
from slimgpt.models.stock_config import stock_config
from slimgpt.planning import TOLERANCE, make_plan


def config(model_type: str = "llama", **changes):
    sizes = {
        "hidden_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 640,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "head_dim": 8,
    }
    if model_type == "phi3":  # has no such field; 96 / 12 gives the same
        del sizes["head_dim"]
    return AutoConfig.for_model(model_type, **{**sizes, **changes})


PLAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "smollm3", "phi3")
"""Families that this config fits; `tests/models/test_families.py` counts the parameters of others on their own."""

CONFIG = config()
SHAPE = describe(CONFIG)
HALF_CHANNEL = SHAPE.layers[0].unit_parameters["ffn"] / 2 / SHAPE.layer_parameters


def built_parameters(base, plan) -> int:
    """The parameters of a model that transformers builds layer by layer at the planned widths."""
    model = empty_model(base)
    removed = 0
    layers = model.get_submodule(ARCHITECTURES[base.model_type].layers)
    for index, (layer, sizes) in enumerate(zip(layers, plan.layers)):
        narrow = copy.deepcopy(base)
        for field, value in {**sizes, "head_dim": head_dim(base)}.items():
            setattr(narrow, field, value)
        new = type(layer)(narrow, index)
        removed += sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in new.parameters())
    return count_tied(model) - removed


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("head_unit", ["kv", "query"])
def test_planned_parameters_are_those_of_the_built_model(model_type, head_unit):
    base = config(model_type)
    plan = make_plan(base, 0.3, head_unit=head_unit)
    assert plan.parameters == built_parameters(base, plan)
    assert abs(plan.achieved - 0.3) <= TOLERANCE


@given(
    ratio=st.floats(0.02, 0.8),
    schedule=st.sampled_from(["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"]),
    head_unit=st.sampled_from(["kv", "query", "auto"]),
)
@settings(max_examples=60, deadline=None)
def test_the_achieved_share_is_the_one_asked_for(ratio, schedule, head_unit):
    try:
        plan = make_plan(CONFIG, ratio, schedule, head_unit, shape=SHAPE)
    except PlanError as error:
        if "cannot lose" not in str(error) or ratio < 0.5:  # a steep schedule may leave a layer without a head
            raise
        return
    assert abs(plan.achieved - ratio) <= max(TOLERANCE, HALF_CHANNEL)
    for sizes in plan.layers:
        assert 1 <= sizes["num_key_value_heads"] <= 4
        assert sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0
        assert 1 <= sizes["intermediate_size"] <= 640
    removed = SHAPE.parameters - plan.parameters
    assert removed / SHAPE.layer_parameters == pytest.approx(plan.achieved)


@given(ratio=st.floats(0.05, 0.5), round_to=st.sampled_from([2, 8, 16, 32]))
@settings(max_examples=40, deadline=None)
def test_rounded_widths(ratio, round_to):
    plan = make_plan(CONFIG, ratio, "uniform", round_to=round_to, shape=SHAPE)
    assert all(sizes["intermediate_size"] % round_to == 0 for sizes in plan.layers)
    assert abs(plan.achieved - ratio) <= max(TOLERANCE, round_to * HALF_CHANNEL)


def test_schedule_shows_in_the_widths():
    for name, order in (("log_increase", 1), ("log_decrease", -1)):
        plan = make_plan(CONFIG, 0.4, name, shape=SHAPE)
        removed = [1 - s["intermediate_size"] / 640 + 1 - s["num_attention_heads"] / 12 for s in plan.layers]
        assert order * (removed[-1] - removed[0]) > 0


def test_query_unit_takes_the_same_number_from_every_group_and_leaves_the_kv_heads():
    plan = make_plan(CONFIG, 0.4, "uniform", "query", shape=SHAPE)
    assert all(sizes["num_key_value_heads"] == 4 for sizes in plan.layers)
    assert all(sizes["num_attention_heads"] in (4, 8) for sizes in plan.layers)


def test_auto_takes_query_heads_only_where_several_share_a_kv_head():
    assert make_plan(CONFIG, 0.2, shape=SHAPE).head_unit == "query"
    assert make_plan(config(num_key_value_heads=12), 0.2).head_unit == "kv"


@pytest.mark.parametrize("model_type", PLAIN)
@pytest.mark.parametrize("round_to", [1, 8])
def test_uniform_widths_are_equal_and_a_stock_class_holds_them(model_type, round_to):
    base = config(model_type)
    plan = make_plan(base, 0.25, uniform=True, round_to=round_to)
    assert plan.uniform
    assert stock_config(base, plan.layers[0]) is not None
    per_step = round_to * HALF_CHANNEL * 6
    assert abs(plan.achieved - 0.25) <= max(TOLERANCE, 2 * per_step)


def test_a_list_of_ratios_sets_every_layer():
    ratios = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    plan = make_plan(CONFIG, None, ratios, shape=SHAPE)
    assert plan.layers[0] == SHAPE.layers[0].sizes
    assert plan.ratio == pytest.approx(0.25)
    assert abs(plan.achieved - 0.25) <= TOLERANCE
    kept = [s["num_attention_heads"] * 100 + s["intermediate_size"] for s in plan.layers]
    assert all(later < earlier for earlier, later in itertools.pairwise(kept))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 0.99}, "without a head"),
        ({"ratio": 0.2, "head_unit": "neurons"}, "unknown"),
        ({"ratio": 0.2, "round_to": 0}, "below 1"),
        ({"ratio": 0.2, "round_to": 1000}, "fewer than"),
        ({"ratio": 0.2, "uniform": True, "schedule": "log_increase"}, "cannot follow"),
        ({"ratio": 0.2, "uniform": True, "round_to": 1000}, "fewer than"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(PlanError, match=message):
        make_plan(CONFIG, shape=SHAPE, **arguments)
