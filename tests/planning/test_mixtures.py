"""Plans for mixtures of experts: whole experts, channels, shared experts, and the share that is promised."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from slimgpt.errors import PlanError
from slimgpt.models import EXPERTS, SHARED
from slimgpt.models.architecture import CHANNELS
from slimgpt.models.build import architecture_of, empty_model
from slimgpt.models.parameter_counts import ExpertsShape, LayerShape, describe
from slimgpt.models.stock_config import apply_sizes
from slimgpt.planning import make_plan, parse_cache, read_plan, to_toml
from slimgpt.planning.ffn import ffn_sizes, least_ffn
from slimgpt.planning.plan import plan_of_widths
from tests.models.families import tiny_config
from tests.models.mixtures import OWN_OF_MIXTURES


def layer(experts, width, hidden, shared=0, tied=0, least=2, groups=1):
    """The shape of a layer of experts of equal width, the router's row counted."""
    sizes = {CHANNELS: width, EXPERTS: experts} | ({SHARED: shared} if shared else {})
    units = {"channel": 3 * hidden, "expert": 3 * hidden * width + hidden, "shared": 3 * hidden}
    units["ffn"] = experts * 3 * hidden + tied * 3 * hidden
    parameters = experts * units["expert"] + shared * units["shared"]
    return LayerShape(sizes, parameters, units, ExpertsShape(least, groups, tied))


@given(
    st.integers(1, 64).map(lambda n: 2 * n),
    st.integers(2, 200).map(lambda n: 8 * n),
    st.floats(0.0, 0.6),
    st.floats(0.0, 1.0),
    st.integers(0, 3),
)
@settings(deadline=None)
def test_what_is_lost_is_within_half_a_step_of_what_was_asked_for(pairs, width, share, whole, tied):
    shape = layer(2 * pairs, width, 32, shared=tied * width, tied=tied, least=2, groups=2)
    loss = share * shape.parameters
    sizes = ffn_sizes(shape, loss, 1, whole)
    step = 8 * shape.channel_parameters(sizes)
    most = shape.removed_from_ffn(least_ffn(shape, 1, whole))
    if loss <= most - step:
        assert abs(shape.removed_from_ffn(sizes) - loss) <= step / 2 + 1
    assert sizes[EXPERTS] >= 2
    assert sizes[EXPERTS] % 2 == 0
    assert sizes[CHANNELS] % 8 == 0
    assert (2 * pairs - sizes[EXPERTS]) * shape.unit_parameters["expert"] <= whole * loss + 1
    assert sizes.get(SHARED, 0) == tied * sizes[CHANNELS]


def test_a_shared_expert_of_its_own_width_loses_the_same_share_as_the_others():
    shape = layer(8, 400, 16, shared=1000)
    sizes = ffn_sizes(shape, 0.25 * shape.parameters, 1)
    assert sizes[SHARED] == pytest.approx(750, abs=2)
    assert sizes[CHANNELS] == pytest.approx(300, abs=8)


@pytest.mark.parametrize("name", OWN_OF_MIXTURES)
@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_parameters_of_a_plan_are_those_of_the_model_that_it_describes(name, whole):
    config = tiny_config(name)
    plan = make_plan(config, 0.35, "uniform", whole_experts=whole)
    model = empty_model(config)
    apply_sizes(model, architecture_of(config), list(plan.layers))
    assert describe(model.config, empty_model(model.config)).parameters == plan.parameters


@pytest.mark.parametrize("whole", [0.0, 0.5, 1.0])
def test_the_promise_holds_for_a_mixture_of_the_size_that_people_use(whole):
    config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=12, num_key_value_heads=4, head_dim=128)
    shape = describe(config)
    for ratio in (0.1, 0.25, 0.5):
        plan = make_plan(config, ratio, whole_experts=whole, shape=shape)
        assert abs(plan.achieved - ratio) <= 0.002
        experts = [layer[EXPERTS] for layer in plan.layers]
        assert min(experts) >= config.num_experts_per_tok
        assert (min(experts) < 128) == (whole > 0)
        assert all(layer[CHANNELS] % 8 == 0 for layer in plan.layers)


def test_a_plan_goes_through_its_file_and_wrong_ones_are_refused(tmp_path):
    config = tiny_config("deepseek_v3")
    plan = make_plan(config, 0.4, whole_experts=1.0)
    file = tmp_path / "plan.toml"
    file.write_text(to_toml(plan, "deepseek_v3"))
    assert read_plan(file, config).layers == plan.layers
    text = file.read_text()
    kept = plan.layers[-1][EXPERTS]
    for wrong, message in ((7, "do not divide among 2 groups"), (4, "fewer than the 6")):
        file.write_text(text.replace(f"{EXPERTS} = {kept}", f"{EXPERTS} = {wrong}"))
        with pytest.raises(PlanError, match=message):
            read_plan(file, config)
    with pytest.raises(PlanError, match="has no experts"):
        make_plan(tiny_config("llama"), 0.2, whole_experts=0.5)
    with pytest.raises(PlanError, match="latent"):
        make_plan(config, cache=parse_cache("1KB@1k"))


def test_a_plan_by_hand_keeps_experts_at_the_widths_that_are_multiplied_together():
    config = tiny_config("mixtral")
    plan = make_plan(config, 0.3)
    odd = [{**sizes, CHANNELS: 35} for sizes in plan.layers]
    with pytest.raises(PlanError, match="layer 0: intermediate_size = 35 is no multiple of 8"):
        plan_of_widths(describe(config), odd, plan.head_unit)
