"""What whole attentions cost, against the model without them; and which go."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slimgpt
from slimgpt.checkpoint.commands import commands
from slimgpt.config import make_config
from slimgpt.errors import PlanError, UsageError
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.models.modeling_slim import skip_attention
from slimgpt.models.parameter_counts import describe
from slimgpt.planning import Sensitivity, StructureCost, allocate_budget, interpolate, make_plan
from slimgpt.planning.allocation import ATTENTION, trial_plan
from slimgpt.planning.restriction import restricted
from slimgpt.planning.targets import cache_bytes, parse_cache
from slimgpt.pruning.in_place import prune_model
from slimgpt.sensitivity.allocate import allocate, allocated
from slimgpt.sensitivity.attention_plans import plans_without_attention
from slimgpt.sensitivity.measure import ENDPOINT, MIDPOINT, measure
from slimgpt.sensitivity.windows import split_windows
from tests.models.families import grouped_config, plan_without, tiny_model, windows
from tests.sensitivity.test_measure import CONFIG, IDS, case, divergence, run

LAYERS = 5
WIDE = grouped_config(LAYERS)
SHAPE = describe(WIDE)
KEPT = {"num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.mark.parametrize("place", ["device", "file"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_cost_is_what_the_narrowed_model_loses_without_that_attention(family, place):
    model, plan, layers = case(family)
    measured = measure(
        model, layers.__getitem__, IDS, plan, CONFIG, run(place), points=MIDPOINT, whole_attention=(2, 3)
    )
    parts = {part.layer: part for part in measured.contributions if part.unit == ATTENTION}
    rest = measure(model, layers.__getitem__, IDS, plan, CONFIG, run(), points=MIDPOINT)
    assert measured.without_attention() == rest
    assert set(parts) == {2, 3}
    fit, probe = split_windows(IDS, 52)
    slim = copy.deepcopy(model)
    for _ in prune_model(slim, fit, plan, CONFIG, run()):
        pass
    compared = probe[: CONFIG.batch_size]  # half of the batches
    assert len(probe) == 6
    for layer, part in parts.items():
        gone = copy.deepcopy(slim)
        skip_attention(gone.get_submodule(lookup(model.config).layers)[layer], lookup(model.config).attention)
        expected = divergence(gone, model, compared) - divergence(slim, model, compared)
        assert part.cost == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert part.removed == 1.0


def test_the_divergence_of_a_plan_without_attention_is_that_of_the_pruned_model(tmp_path):
    model, _, layers = case("llama")
    config = make_config(plan=str(plan_without(model, tmp_path)), batch_size=5)
    plan = slimgpt.planning.planner.plan_for(model.config, config, describe(model.config, model))
    assert [sizes["num_attention_heads"] for sizes in plan.layers[1:]] == [0, 0, 0]
    measured = measure(model, layers.__getitem__, IDS, plan, CONFIG, run(), points=ENDPOINT)
    fit, probe = split_windows(IDS, 52)
    slim = copy.deepcopy(model)
    for _ in prune_model(slim, fit, plan, CONFIG, run()):
        pass
    assert measured.divergence == pytest.approx(divergence(slim, model, probe), rel=1e-6)


def useless(model, *layers):
    """A model in which the attention of some layers adds nothing."""
    with torch.no_grad():
        for layer in layers:
            projection = model.model.layers[layer].self_attn.o_proj
            projection.weight.zero_()
            if projection.bias is not None:
                projection.bias.zero_()
    return model


OPTIONS = {"calibration": windows(24, 24), "batch_size": 5, "device": "cpu", "distill": "off"}


@pytest.mark.parametrize("allocation", ["auto", "search"])
def test_an_attention_that_adds_nothing_goes(allocation):
    model = useless(tiny_model("llama"), 2, 3)
    calls = []
    report = slimgpt.prune(
        model, None, 0.3, drop_attention=True, allocation=allocation, on_measured=lambda *c: calls.append(c), **OPTIONS
    )
    assert {2, 3} <= {i for i, sizes in enumerate(report.plan.layers) if not sizes["num_attention_heads"]}
    assert report.layers[2].kept["heads"] == []
    assert report.plan.achieved == pytest.approx(0.3, abs=0.005)
    allocated = report.allocation
    assert allocated["divergence"] == min(allocated["tried"])
    chosen = allocated["tried"].index(min(allocated["tried"]))
    assert {2, 3} <= set(allocated["tried_without_attention"][chosen])
    assert allocated["tried_without_attention"][0] == []
    assert {part["layer"] for part in allocated["contributions"] if part["unit"] == "attention"} == {1, 2, 3}
    steps = 4 * ((3 + 1 + 2 * 4) if allocation == "search" else (3 + 1 + 2 * 3))
    assert {call[1] for call in calls} == {steps}
    assert [call[0] for call in calls] == list(range(len(calls)))
    assert len(calls) <= steps
    assert "--drop-attention" in commands(report)[0]


def test_without_the_setting_none_goes():
    report = slimgpt.prune(useless(tiny_model("llama"), 2, 3), None, 0.3, allocation="sensitivity", **OPTIONS)
    assert all(sizes["num_attention_heads"] for sizes in report.plan.layers)


def test_one_that_matters_stays():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
    report = slimgpt.prune(model, None, 0.2, drop_attention=True, **OPTIONS)
    assert all(sizes["num_attention_heads"] for sizes in report.plan.layers)


costs = st.lists(st.floats(1e-4, 1.0), min_size=LAYERS, max_size=LAYERS)


@settings(max_examples=60, deadline=None)
@given(costs, costs, costs, st.floats(0.05, 0.5), st.sampled_from([1, 4]))
def test_the_target_is_met_and_no_ffn_is_lost(ffn, heads, whole, ratio, round_to):
    parts = [StructureCost(i, "ffn", 0.4, cost) for i, cost in enumerate(ffn)]
    parts += [StructureCost(i, "query", 0.5, cost) for i, cost in enumerate(heads)]
    parts += [StructureCost(i, ATTENTION, 1.0, cost / 10) for i, cost in enumerate(whole) if i]
    measured = Sensitivity(sum(part.cost for part in parts), tuple(parts))
    plan = make_plan(WIDE, ratio, shape=SHAPE, round_to=round_to)

    def cheapest(budget, costs):
        best = allocate_budget(budget, SHAPE, costs, round_to)
        return interpolate(budget, best, SHAPE, 1 - plan.achieved, round_to)

    for candidate in plans_without_attention(plan, SHAPE, measured, cheapest, WIDE, None):
        assert candidate.achieved == pytest.approx(plan.achieved, abs=0.01)
        assert candidate.achieved >= plan.achieved - 1e-12
        assert candidate.layers[0]["num_attention_heads"]
        assert any(not sizes["num_attention_heads"] for sizes in candidate.layers)
        for sizes in candidate.layers:
            assert sizes["intermediate_size"] >= 1
            assert sizes["intermediate_size"] % round_to == 0
            assert (sizes["num_attention_heads"] == 0) == (sizes["num_key_value_heads"] == 0)
    assert all(sizes["num_attention_heads"] for sizes in cheapest(plan, measured.without_attention()).layers)


def test_whole_attentions_make_room_in_the_cache():
    config = make_config(ratio=0.3, kv_cache="16KB@64", drop_attention=True, batch_size=5)
    model = useless(tiny_model("llama"), 2, 3).double()
    shape = restricted(describe(model.config, model), config)
    plan = slimgpt.planning.planner.plan_for(model.config, config, shape)
    chosen, info = allocate(plan, shape, model, model.model.layers.__getitem__, IDS, config, run())
    kv_heads = [sizes["num_key_value_heads"] for sizes in chosen.layers]
    assert cache_bytes(model.config, kv_heads, 64) <= parse_cache("16KB@64").bytes
    assert kv_heads[2:] == [0, 0]
    assert sum(kv_heads[:2]) > sum(sizes["num_key_value_heads"] for sizes in plan.layers[:2])
    assert info["tried_without_attention"][0] == []
    assert chosen.achieved == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5])
def test_no_plan_without_attention_exceeds_the_cache(share):
    """A limit that most layers meet with all their heads leaves these without a measured cost of heads."""
    model = tiny_model("llama", num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4)
    limit = int(share * cache_bytes(model.config, [4] * 6, 64))
    config = make_config(ratio=0.3, kv_cache=f"{limit}@64", drop_attention=True)
    shape = restricted(describe(model.config, model), config)
    plan = slimgpt.planning.planner.plan_for(model.config, config, shape)
    trial = trial_plan(plan, shape, heads=False)
    parts = [StructureCost(index, ATTENTION, 1.0, 0.001 * index) for index in range(1, 6)]
    for index, sizes in enumerate(trial.layers):
        parts.append(StructureCost(index, "ffn", 0.3, 0.01))
        if sizes["num_key_value_heads"] < 4:
            parts.append(StructureCost(index, "kv", 1 - sizes["num_key_value_heads"] / 4, 0.01))

    def cheapest(budget, costs):
        return allocated(budget, shape, costs, config, model.config)[0]

    measured = Sensitivity(0.1, tuple(parts))
    plans = plans_without_attention(plan, shape, measured, cheapest, model.config, config.cache_target)
    assert plans
    for tried in plans:
        kv_heads = [sizes["num_key_value_heads"] for sizes in tried.layers]
        assert 0 in kv_heads
        assert cache_bytes(model.config, kv_heads, 64) <= limit
        assert tried.achieved == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("other", "leave_out"),
    [({"uniform": True}, "uniform"), ({"ffn_only": True}, "ffn_only"), ({"method": "paper"}, "method paper"),
     ({"allocation": "schedule"}, "allocation schedule"),
     ({"schedule": "uniform"}, "leave out schedule, or drop_attention"),
     ({"plan": "plan.toml", "ratio": None}, "leave out plan, or drop_attention"),
     ({"kv_cache": "1MB@1k", "ratio": None}, "drop_attention spends a size")],
)  # fmt: skip
def test_what_excludes_it(other, leave_out):
    with pytest.raises(UsageError, match=leave_out):
        make_config(**{"ratio": 0.3, "drop_attention": True, **other})


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe", "cohere2"])
def test_families_that_cannot_are_refused(family):
    with pytest.raises(PlanError, match="can do without its attention"):
        slimgpt.prune(tiny_model(family), None, 0.2, drop_attention=True, **OPTIONS)


def test_a_layer_that_is_skipped_keeps_it():
    model = useless(tiny_model("llama"), 2, 3)
    report = slimgpt.prune(model, None, 0.2, drop_attention=True, skip_layers=(2,), **OPTIONS)
    assert report.plan.layers[2] == {**KEPT, "intermediate_size": 52}
    assert layer_sizes(model.config)[3]["num_attention_heads"] == 0
