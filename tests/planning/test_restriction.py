"""`ffn_only`, `heads_only` and `skip_layers`: what they keep is kept, and the rest makes up for it."""

from __future__ import annotations

import json

import pytest
import torch

import slimgpt
from slimgpt.config import make_config
from slimgpt.errors import PlanError, UsageError
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.planner import plan_for
from slimgpt.planning.restriction import restricted, skipped_layers
from tests.models.families import tiny_model

OPTIONS = {"num_samples": 12, "seq_len": 32, "device": "cpu"}


def plan_with(model, **settings):
    config = make_config(**settings)
    return plan_for(model.config, config, restricted(describe(model.config, model), config))


@pytest.mark.parametrize("schedule", ["log_increase", "uniform"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "lfm2"])
@pytest.mark.parametrize("kept", ["ffn_only", "skip_layers"])
def test_the_rest_makes_up_for_what_is_kept(family, kept, schedule):
    model = tiny_model(family)
    dense = [layer.sizes for layer in describe(model.config, model).layers]
    settings = {"ffn_only": True} if kept == "ffn_only" else {"skip_layers": (0, -1)}
    ratio = 0.1 if family == "lfm2" else 0.15  # what is left of so small a hybrid can lose no more
    plan = plan_with(model, ratio=ratio, schedule=schedule, **settings)
    if kept == "ffn_only":
        names = ("num_attention_heads", "num_key_value_heads")
        assert all(new[n] == old[n] for new, old in zip(plan.layers, dense) for n in names)
    else:
        assert plan.layers[0] == dense[0]
        assert plan.layers[-1] == dense[-1]
    assert plan.layers != tuple(dense)
    assert plan.achieved == pytest.approx(ratio, abs=0.02)


def test_heads_only_keeps_every_channel():
    model = tiny_model("llama")
    plan = plan_with(model, ratio=0.12, heads_only=True)
    assert {layer["intermediate_size"] for layer in plan.layers} == {52}
    assert plan.parameters < plan.parameters_before


@pytest.mark.parametrize("share", [0.85, 0.93, 0.99])
@pytest.mark.parametrize("head_unit", ["kv", "query"])
def test_heads_alone_meet_a_limit_and_not_one_more_goes(head_unit, share):
    model = tiny_model("llama")
    shape = describe(model.config, model)
    limit = int(share * shape.parameters)
    plan = plan_with(model, params=limit, heads_only=True, head_unit=head_unit)
    assert {layer["intermediate_size"] for layer in plan.layers} == {52}
    unit = shape.layers[0].unit_parameters[head_unit]
    assert plan.parameters <= limit < plan.parameters + unit


def test_a_limit_that_heads_alone_cannot_meet_is_refused():
    with pytest.raises(PlanError, match="removing heads alone; ask for more, or leave out heads_only"):
        plan_with(tiny_model("llama"), params="20k", heads_only=True)


def test_equal_layers_lose_heads_alone():
    options = {**OPTIONS, "ratio": 0.15, "allocation": "sensitivity", "distill": "off", "evaluate": False}
    ids = torch.randint(60, (40, 32), generator=torch.Generator().manual_seed(0))
    report = slimgpt.prune(tiny_model("llama"), None, calibration=ids, uniform=True, heads_only=True, **options)
    assert report.allocation["by"] == "sensitivity"
    assert {layer["intermediate_size"] for layer in report.plan.layers} == {52}
    assert {layer["num_attention_heads"] for layer in report.plan.layers} == {3}


@pytest.mark.parametrize("allocation", ["schedule", "sensitivity"])
@pytest.mark.parametrize("settings", [{"ffn_only": True}, {"heads_only": True}, {"skip_layers": "0,-1"}])
def test_runs_keep_what_they_shall(settings, allocation, tokenizer, text_file, tmp_path):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = slimgpt.prune(
        model, tokenizer, 0.12, str(text_file), allocation=allocation, distill="off", **settings, **OPTIONS
    )
    after = model.state_dict()
    for index, (old, new) in enumerate(zip(report.dense_sizes, report.plan.layers)):
        skipped = "skip_layers" in settings and index in (0, 3)
        if "ffn_only" in settings or skipped:
            name = f"model.layers.{index}.self_attn.o_proj.weight"
            assert torch.equal(after[name], before[name])
        if "heads_only" in settings or skipped:
            assert new["intermediate_size"] == old["intermediate_size"]
            name = f"model.layers.{index}.mlp.up_proj.weight"
            assert torch.equal(after[name], before[name])
    slimgpt.save(model, tokenizer, report, tmp_path / "slim")
    values = json.loads((tmp_path / "slim/slimgpt.json").read_text())
    assert slimgpt.PruneReport.from_json(values).settings == report.settings
    flag = next(iter(settings)).replace("_", "-")
    assert f"--{flag}" in (tmp_path / "slim/README.md").read_text()
    assert sum(p.numel() for p in slimgpt.load(str(tmp_path / "slim"))[0].parameters()) == report.plan.parameters


def test_negative_layers_count_from_the_end():
    assert skipped_layers((0, -1, 3), 4) == {0, 3}
    with pytest.raises(PlanError, match="skip_layers names layer 4, but the model has 4: 0 to 3"):
        skipped_layers((4,), 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ffn_only": True, "heads_only": True}, "exclude each other"),
        ({"ffn_only": True, "kv_cache": "1GB@32k"}, "kv_cache removes KV heads, and ffn_only keeps them"),
        ({"heads_only": True, "whole_experts": 0.5}, "whole_experts removes experts"),
        ({"heads_only": True, "method": "reap"}, "method reap removes experts"),
        ({"skip_layers": "0", "uniform": True}, "skip_layers makes layers differ"),
        ({"skip_layers": "first"}, "skip_layers 'first' is no list of layers such as 0,1,-1"),
        ({"skip_layers": "0", "plan": "plan.toml"}, "a plan file says every width"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(UsageError, match=message):
        make_config(**settings)


@pytest.mark.parametrize("step", ["auto", 1, "1"])
def test_a_step_that_asks_for_nothing_goes_with_a_plan_file(step):
    assert make_config(plan="plan.toml", round_to=step).round_to in ("auto", 1)
    with pytest.raises(UsageError, match="a plan file says every width"):
        make_config(plan="plan.toml", round_to="2")


@pytest.mark.parametrize("settings", [{}, {"heads_only": True}, {"uniform": True}])
def test_a_share_too_small_for_any_unit_is_refused(settings):
    model = tiny_model("llama")
    shape = describe(model.config, model)
    units = shape.layers[0].unit_parameters
    least = units["query"] if "heads_only" in settings else min(units.values())
    with pytest.raises(PlanError, match=rf"removes nothing: .* the smallest unit that can go has {least:,}"):
        plan_with(model, ratio=0.1 * least / shape.layer_parameters, **settings)
    plan = plan_with(model, ratio=1.1 * least * len(shape.layers) / shape.layer_parameters, **settings)
    assert plan.parameters < shape.parameters


def test_a_limit_just_below_the_model_takes_one_unit():
    model = tiny_model("llama")
    shape = describe(model.config, model)
    assert plan_with(model, params=shape.parameters - 10).parameters <= shape.parameters - 10


def test_nothing_left_to_remove():
    with pytest.raises(PlanError, match="leave nothing that can be removed"):
        plan_with(tiny_model("llama"), ratio=0.2, skip_layers=(0, 1, 2, 3))
