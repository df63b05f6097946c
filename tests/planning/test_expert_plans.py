"""Plans with whole experts in place of channels: what goes, how much of it, and what stays."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from slimgpt.config import make_config
from slimgpt.models import EXPERTS, SHARED
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.build import architecture_of, empty_model
from slimgpt.models.parameter_counts import describe
from slimgpt.models.stock_config import apply_sizes, stock_config
from slimgpt.planning.expert_plans import with_whole_experts
from slimgpt.planning.plan import Plan
from slimgpt.planning.planner import plan_for
from tests.models.families import tiny_config
from tests.models.mixtures import OWN_OF_MIXTURES

LARGE = {
    "qwen3_moe": {"num_hidden_layers": 12, "num_key_value_heads": 4, "head_dim": 128},
    "qwen2_moe": {"num_hidden_layers": 12},
    "deepseek_v3": {"num_hidden_layers": 12},
    "gpt_oss": {"num_hidden_layers": 12},
    "mixtral": {"num_hidden_layers": 12},
}
"""Mixtures of the size that people use, with fewer layers."""


def planned(config, **settings):
    """The plan without whole experts, what it was made from, and a function to the plan with a share of them."""
    chosen, shape = make_config(**settings), describe(config)
    plan = plan_for(config, chosen, shape)

    def tried(share: float, routed_only: bool) -> Plan | None:
        return with_whole_experts(plan, shape, chosen, config, share, routed_only=routed_only)

    return plan, shape, tried


def routed_loss(shape, plan) -> int:
    """The parameters that routed experts lose, counted matrix by matrix."""
    lost = 0
    for layer, sizes in zip(shape.layers, plan.layers):
        if layer.experts is None:
            continue
        before, after = layer.sizes, sizes
        whole = before[EXPERTS] - after[EXPERTS]
        lost += whole * layer.unit_parameters["expert"]
        lost += (before[CHANNELS] - after[CHANNELS]) * after[EXPERTS] * layer.unit_parameters["channel"]
    return lost


@pytest.mark.parametrize("ratio", [0.25, 0.5])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("routed_only", [False, True])
@pytest.mark.parametrize("family", LARGE)
def test_the_share_goes_as_whole_experts_and_the_size_stays(family, routed_only, share, ratio):
    config = AutoConfig.for_model(family, **LARGE[family])
    plan, shape, tried = planned(config, ratio=ratio)
    made = tried(share, routed_only)
    assert made is not None
    assert 0 <= plan.parameters - made.parameters <= 0.002 * shape.layer_parameters
    sparse = [index for index, layer in enumerate(shape.layers) if layer.experts is not None]
    gone = {shape.layers[index].sizes[EXPERTS] - made.layers[index][EXPERTS] for index in sparse}
    assert len(gone) == 1
    whole = gone.pop()
    each = sum(shape.layers[index].unit_parameters["expert"] for index in sparse)
    bounds = shape.layers[sparse[0]].experts
    assert whole > 0
    assert whole % bounds.groups == 0
    target = plan.parameters_before - plan.parameters if routed_only else routed_loss(shape, plan)
    most = shape.layers[sparse[0]].sizes[EXPERTS] - bounds.least
    slack = 0.1 * target if bounds.tied else 0  # a shared expert that follows the others' width counts with them
    assert whole * each <= share * target + slack
    assert whole == most // bounds.groups * bounds.groups or (whole + bounds.groups) * each > share * target - slack
    for layer, before, sizes in zip(shape.layers, plan.layers, made.layers):
        other = layer.sizes if routed_only else before
        assert (sizes[HEADS], sizes[KV_HEADS]) == (other[HEADS], other[KV_HEADS])
        if layer.experts is None:
            assert sizes[CHANNELS] == other[CHANNELS]
        elif SHARED in sizes and not layer.experts.tied:
            assert sizes[SHARED] == other[SHARED]


@pytest.mark.parametrize("name", OWN_OF_MIXTURES)
def test_parameters_are_those_of_the_model_that_a_plan_describes(name):
    config = tiny_config(name)
    _, _, tried = planned(config, ratio=0.35, schedule="uniform")
    plans = [plan for share in (0.5, 1.0) for only in (False, True) if (plan := tried(share, only)) is not None]
    assert plans
    for plan in plans:
        model = empty_model(config)
        apply_sizes(model, architecture_of(model.config), list(plan.layers))
        assert describe(model.config, empty_model(model.config)).parameters == plan.parameters


def test_a_limit_that_is_that_of_whole_experts_leaves_the_channels():
    """A limit to the parameter, as in a comparison with a method that removes whole experts alone."""
    config = AutoConfig.for_model("qwen3_moe", **LARGE["qwen3_moe"])
    shape = describe(config)
    gone = 32
    limit = shape.parameters - gone * sum(layer.unit_parameters["expert"] for layer in shape.layers)
    plan, _, tried = planned(config, params=limit)
    made = tried(1.0, True)
    assert plan.parameters <= limit
    assert made.parameters <= limit
    assert {sizes[EXPERTS] for sizes in made.layers} == {shape.layers[0].sizes[EXPERTS] - gone}
    # The plan without them removes a little more, which as few channels make up for.
    narrowed = [sizes[CHANNELS] for sizes in made.layers if sizes[CHANNELS] < shape.layers[0].sizes[CHANNELS]]
    assert len(narrowed) <= 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("size", [{"ratio": 0.3}, {"params": 0.75}])
def test_equal_layers_stay_equal_and_a_stock_class(family, size):
    config = AutoConfig.for_model(family, **LARGE[family])
    if "params" in size:
        size = {"params": int(size["params"] * describe(config).parameters)}
    plan, _, tried = planned(config, uniform=True, **size)
    for share in (0.5, 1.0):
        made = tried(share, True)
        assert made is not None
        assert made.uniform
        assert made.layers[0][EXPERTS] < plan.layers[0][EXPERTS]
        assert made.layers[0][HEADS] == config.num_attention_heads
        assert abs(made.achieved - plan.ratio) <= 0.005
        assert made.layers[0][CHANNELS] % 8 == 0
        assert stock_config(config, made.layers[0]) is not None
        assert "params" not in size or made.parameters <= size["params"]


def test_what_a_cache_takes_goes_without_what_else_is_removed():
    config = AutoConfig.for_model("qwen3_moe", **LARGE["qwen3_moe"])
    plan, _, tried = planned(config, ratio=0.3, kv_cache="60MB@4k")
    made = tried(1.0, True)
    assert plan.layers[0][KV_HEADS] < config.num_key_value_heads
    assert [sizes[KV_HEADS] for sizes in made.layers] == [sizes[KV_HEADS] for sizes in plan.layers]


def test_none_where_less_than_an_expert_of_every_layer_goes():
    config = AutoConfig.for_model("mixtral", **LARGE["mixtral"])
    _, _, tried = planned(config, ratio=0.05)
    assert tried(1.0, True) is None
    dense = tiny_config("llama")
    _, _, tried = planned(dense, ratio=0.3)
    assert tried(1.0, True) is None
