"""Targets, plan files and verdicts: never exceeded, as near as the units allow, and true."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import slimgpt
from slimgpt.errors import PlanError, UsageError
from slimgpt.models.build import empty_model
from slimgpt.models.families import ARCHITECTURES
from slimgpt.models.parameter_counts import count_tied, describe
from slimgpt.models.stock_config import apply_sizes
from slimgpt.planning import (
    constraints_for,
    engine_support,
    make_plan,
    parse_cache,
    parse_count,
    parse_size,
    read_plan,
    to_toml,
)
from slimgpt.planning.plan import plan_of_widths
from slimgpt.planning.targets import CacheTarget, cache_bytes
from tests.models.families import CORE, tiny_model, windows

CONFIG = AutoConfig.for_model(
    "llama", hidden_size=96, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4, intermediate_size=256,
    vocab_size=500, head_dim=8,
)  # fmt: skip
SHAPE = describe(CONFIG)


def parameters_of(config, layers) -> int:
    """Counted on the model itself, built without storage."""
    model = empty_model(config)
    apply_sizes(model, ARCHITECTURES[config.model_type], [dict(layer) for layer in layers])
    return count_tied(empty_model(model.config))


@given(
    share=st.floats(0.15, 0.98),
    round_to=st.sampled_from([1, 8, 32]),
    unit=st.sampled_from(["auto", "kv", "query"]),
    schedule=st.sampled_from([None, "uniform", "linear_decrease"]),
)
@settings(max_examples=60, deadline=None)
def test_a_limit_is_met_and_never_exceeded(share, round_to, unit, schedule):
    limit = int(SHAPE.other_parameters + share * SHAPE.layer_parameters)
    try:
        plan = make_plan(CONFIG, None, schedule, unit, round_to, shape=SHAPE, limit=limit)
    except PlanError:
        # A schedule asks up to (1 + ratio) / 2 of its last layers; one head unit and 32 channels left make 78%.
        assert share < 0.45
        return
    assert plan.parameters <= limit
    assert parameters_of(CONFIG, plan.layers) == plan.parameters
    step = round_to * SHAPE.layers[0].unit_parameters["ffn"]
    grow = any(layer["intermediate_size"] + round_to <= 256 for layer in plan.layers)
    assert limit - plan.parameters < step or not grow


@pytest.mark.parametrize("round_to", [1, 32])
def test_a_uniform_limit_is_never_exceeded(round_to):
    for share in (0.5, 0.7, 0.9):
        limit = int(SHAPE.other_parameters + share * SHAPE.layer_parameters)
        plan = make_plan(CONFIG, None, None, "auto", round_to, uniform=True, shape=SHAPE, limit=limit)
        assert plan.uniform
        assert plan.parameters <= limit
        assert limit - plan.parameters < 6 * round_to * SHAPE.layers[0].unit_parameters["ffn"]


@given(share=st.floats(0.26, 0.99), context=st.sampled_from([1, 1024, 32768]), uniform=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_cache_is_met_and_never_exceeded(share, context, uniform):
    dense = cache_bytes(CONFIG, [4] * 6, context)
    target = CacheTarget(int(share * dense), context)
    plan = make_plan(CONFIG, None, None, "auto", 1, uniform, shape=SHAPE, cache=target)
    heads = [layer["num_key_value_heads"] for layer in plan.layers]
    assert cache_bytes(CONFIG, heads, context) <= target.bytes
    assert cache_bytes(CONFIG, heads, context) + (6 if uniform else 1) * dense / 24 > target.bytes
    assert {layer["intermediate_size"] for layer in plan.layers} == {256}
    assert parameters_of(CONFIG, plan.layers) == plan.parameters


def test_a_cache_and_a_size_together():
    cache = CacheTarget(cache_bytes(CONFIG, [2] * 6, 100), 100)
    limit = int(SHAPE.other_parameters + 0.6 * SHAPE.layer_parameters)
    plan = make_plan(CONFIG, None, None, shape=SHAPE, limit=limit, cache=cache)
    assert [layer["num_key_value_heads"] for layer in plan.layers] == [2] * 6
    assert limit - SHAPE.layers[0].unit_parameters["ffn"] < plan.parameters <= limit


def test_windows_bound_the_cache_of_sliding_layers():
    config = tiny_model("gemma3_text").config  # windows of 5 tokens in every second layer
    full, sliding = (cache_bytes(config, heads, 60) for heads in ([0, 1, 0, 1], [1, 0, 1, 0]))
    assert full == 2 * 60 * 2 * 10 * 2
    assert sliding == 2 * 5 * 2 * 10 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 10**9}, "already"),
        ({"limit": 1000}, "embeddings, head and norms alone"),
        ({"limit": 400_000, "ratio": 0.2}, "leave out one"),
        ({"cache": CacheTarget(10**9, 10)}, "fits already"),
        ({"cache": CacheTarget(10, 10)}, "one KV head per layer"),
        ({"cache": CacheTarget(10**4, 10), "head_unit": "query"}, "whole KV heads"),
    ],
)
def test_targets_that_cannot_be(arguments, message):
    with pytest.raises(PlanError, match=message):
        make_plan(CONFIG, shape=SHAPE, **arguments)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_count, "1.0B", 10**9), (parse_count, "350m", 350_000_000), (parse_count, 1234, 1234),
        (parse_count, "1_000_000", 10**6), (parse_size, "800MB", 8 * 10**8), (parse_size, "1.5GiB", 3 * 2**29),
        (parse_size, "2g", 2 * 10**9), (parse_cache, "1GB@32k", CacheTarget(10**9, 32768)),
        (parse_cache, "500MiB@4096", CacheTarget(500 * 2**20, 4096)),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text"),
    [(parse_count, "1.0GBB"), (parse_count, ""), (parse_count, "-3B"), (parse_count, "0"), (parse_size, "8 apples"),
     (parse_size, "1B@2"), (parse_cache, "1GB"), (parse_cache, "1GB@"), (parse_cache, "@32k"), (parse_cache, "1GB@0")],
)  # fmt: skip
def test_sizes_that_are_none(parse, text):
    with pytest.raises(UsageError, match="give"):
        parse(text)


def test_only_one_size_may_be_given():
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="ratio and params were given"):
        slimgpt.prune(model, None, 0.2, windows(), params="10k", device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pruning_to_bytes_on_disk(dtype, dense_folder, tmp_path, text_file):
    options = {"calibration": str(text_file), "num_samples": 8, "seq_len": 24, "device": "cpu", "dtype": dtype}
    slimgpt.prune_folder(str(dense_folder), tmp_path / "r", 0.3, **options)
    wanted = (tmp_path / "r" / "model.safetensors").stat().st_size + 20_000
    slimgpt.prune_folder(str(dense_folder), tmp_path / "b", bytes=wanted, **options)
    size = (tmp_path / "b" / "model.safetensors").stat().st_size
    assert size <= wanted
    assert wanted - size < 20_000


# Plan files


@given(seed=st.integers(0, 10**6), unit=st.sampled_from(["kv", "query"]))
@settings(max_examples=30, deadline=None)
def test_a_plan_survives_its_file(seed, unit, tmp_path_factory):
    draw = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    layers = []
    for _ in range(6):
        kv = pick(1, 4) if unit == "kv" else 4
        group = 3 if unit == "kv" else pick(1, 3)
        layers.append({"num_attention_heads": kv * group, "num_key_value_heads": kv, "intermediate_size": pick(1, 256)})
    plan = plan_of_widths(SHAPE, layers, unit)
    file = tmp_path_factory.mktemp("plan") / "plan.toml"
    file.write_text(to_toml(plan, "llama"))
    assert read_plan(file, CONFIG) == plan
    assert parameters_of(CONFIG, plan.layers) == plan.parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("head_unit", "headunit"), "unknown key 'headunit'"),
        (('"llama"', '"qwen2"'), "is a plan for 'qwen2'"),
        (("intermediate_size = 205", "intermediate_size = 257"), "outside 1..256"),
        (("intermediate_size = 205", "intermediate_size = 20.5"), "whole number"),
        (("num_key_value_heads = 4", "num_key_value_heads = 3"), "keeps all KV heads"),
        (("num_attention_heads = 8", "num_attention_heads = 9"), "do not divide"),
        (("parameters = ", "parameters = 1"), "these widths make"),
        (('"query"', '"kv"'), "keeps 3 query heads"),
        (("[", "{"), "cannot read the plan"),
    ],
)
def test_plan_files_that_do_not_fit(change, message, tmp_path):
    layer = "    { num_attention_heads = 8, num_key_value_heads = 4, intermediate_size = 205 },\n"
    plan = plan_of_widths(SHAPE, [{"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 205}] * 6,
                          "query")  # fmt: skip
    text = to_toml(plan, "llama")
    assert layer in text
    (tmp_path / "plan.toml").write_text(text.replace(*change))
    with pytest.raises(PlanError, match=message):
        read_plan(tmp_path / "plan.toml", CONFIG)


def test_a_plan_is_followed_to_the_letter(tmp_path):
    model = tiny_model("qwen3")
    widths = [(6, 3, 52), (3, 3, 40), (3, 3, 7), (6, 3, 51)]
    fields = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    layers = [dict(zip(fields, values)) for values in widths]
    file = tmp_path / "plan.toml"
    file.write_text(to_toml(plan_of_widths(describe(model.config), layers, "query"), "qwen3"))
    report = slimgpt.prune(model, None, plan=str(file), calibration=windows(), device="cpu")
    assert list(report.plan.layers) == layers
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [52, 40, 7, 51]
    assert [layer.self_attn.o_proj.in_features for layer in model.model.layers] == [60, 30, 30, 60]
    with pytest.raises(UsageError, match="plan file says every width"):
        slimgpt.prune(tiny_model("qwen3"), None, plan=str(file), uniform=True, calibration=windows(), device="cpu")


# Verdicts


@pytest.mark.parametrize(("family", "uniform", "unit"), [*itertools.product(CORE, (False, True), ("kv", "query"))])
def test_a_verdict_on_transformers_is_what_loading_does(family, uniform, unit, tmp_path):
    model = tiny_model(family)
    try:
        report = slimgpt.prune(model, None, 0.3, windows(), uniform=uniform, head_unit=unit, device="cpu")
    except PlanError:
        assert uniform
        return
    verdict = engine_support(model.config, report.plan.layers, ["hf"])[0]
    slimgpt.save(model, None, report, tmp_path / "slim")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", trust_remote_code=False)
        stock = type(loaded).__module__.startswith("transformers.")
    except (ValueError, OSError, RuntimeError):
        stock = False
    assert verdict.runs
    assert stock == verdict.how.startswith("stock class")
    if "relabelled as" in verdict.how:
        assert loaded.config.model_type == verdict.how.split()[-1]


def test_profiles_combine_to_the_strictest():
    assert (constraints_for(["hf"]).round_to, constraints_for(["hf"]).uniform) == (1, False)
    assert (constraints_for(["llama.cpp", "vllm"]).round_to, constraints_for(["llama.cpp", "vllm"]).uniform) == (
        64,
        True,
    )
    with pytest.raises(PlanError, match="'tensorrt' is unknown; choose hf, vllm"):
        constraints_for(["tensorrt"])
    with pytest.raises(PlanError, match="unknown"):
        engine_support(CONFIG, SHAPE.layers, ["tensorrt"])
