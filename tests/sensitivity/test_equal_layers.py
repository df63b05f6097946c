"""Equal layers end to end: measured, followed, trained, saved as a stock class."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimgpt
from slimgpt.config import make_config
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.parameter_counts import describe
from slimgpt.models.stock_config import stock_config
from slimgpt.planning import Sensitivity, StructureCost
from slimgpt.planning.equal_widths import pair_cost
from slimgpt.planning.plan import plan_of_widths
from slimgpt.runtime.memory import Placement
from slimgpt.runtime.thresholds import other_thresholds
from slimgpt.sensitivity.equal_layers import equal_candidates
from slimgpt.sensitivity.measure import measure
from tests.models.families import tiny_model, windows

IDS = windows(40, 24)
OPTIONS = {"ratio": 0.3, "calibration": IDS, "batch_size": 5, "device": "cpu", "uniform": True}


def test_equal_layers_are_measured_trained_and_a_stock_class(tmp_path):
    model = tiny_model("llama")
    config, shape = model.config, describe(model.config, model)
    with other_thresholds(equal_cost_ratio=1.0):  # what is cheapest, without a trial
        report = slimgpt.prune(model, None, distill=400, **OPTIONS)
    assert report.allocation["by"] == "sensitivity"
    assert report.plan.uniform
    assert report.plan.achieved == pytest.approx(0.3, abs=0.005)
    assert report.distillation["tokens"] > 0
    # The widths are those of the least sum of costs among all heads, at the width that meets the target.
    layer = shape.layers[0]
    costs = Sensitivity(0.0, tuple(StructureCost(**cost) for cost in report.allocation["contributions"]))
    unit, size = report.plan.head_unit, layer.sizes["intermediate_size"]
    units = layer.sizes["num_attention_heads"] // (layer.sizes["num_key_value_heads"] if unit == "query" else 1)
    curve = {}
    for kept in range(1, units + 1):
        rest = 0.3 * layer.parameters - (units - kept) * layer.unit_parameters[unit]
        exact = rest / layer.unit_parameters["ffn"]
        if 0 <= exact < size:
            curve[kept] = pair_cost(costs.with_floor(), unit, 1 - kept / units, exact / size)
    heads = report.plan.layers[0]["num_attention_heads"] // report.plan.layers[0]["num_key_value_heads"]
    assert heads == min(curve, key=lambda kept: curve[kept])
    assert {pair["heads"]: pair["cost"] for pair in report.allocation["pairs"]}[heads] == pytest.approx(curve[heads])
    slimgpt.save(model, None, report, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim")
    assert type(loaded).__module__.startswith("transformers.")
    assert loaded.config.intermediate_size == report.plan.layers[0]["intermediate_size"]
    assert stock_config(config, report.plan.layers[0]) is not None


@pytest.mark.parametrize("allocation", ["sensitivity", "search"])
def test_pairs_that_cost_nearly_as_little_are_tried_and_the_better_is_taken(allocation):
    with other_thresholds(equal_cost_ratio=1e9):
        report = slimgpt.prune(tiny_model("llama"), None, allocation=allocation, distill="off", **OPTIONS)
    assert report.allocation["by"] == allocation
    tried = report.allocation["tried"]
    assert len(tried) == 2
    assert report.allocation["divergence"] == min(tried)
    assert report.plan.uniform
    model = tiny_model("llama")
    run = ExecutionContext(torch.device("cpu"), Placement(0, "device", "device"))
    again = measure(model, model.model.layers.__getitem__, IDS, report.plan, report.settings, run)
    assert again.divergence == pytest.approx(min(tried), rel=1e-3)


def test_a_measured_split_leaves_what_is_dear():
    model = tiny_model("llama")
    shape, settings = describe(model.config, model), make_config(ratio=0.3, uniform=True)
    first = shape.layers[0]
    dense = plan_of_widths(shape, [dict(each.sizes) for each in shape.layers], "query", ratio=0.3)
    chosen = {}
    for name, heads, ffn in (("heads", 5.0, 0.01), ("channels", 0.01, 5.0)):
        costs = [
            StructureCost(i, u, 0.5, c) for i in range(len(shape.layers)) for u, c in (("query", heads), ("ffn", ffn))
        ]
        candidates, info = equal_candidates(dense, shape, Sensitivity(1.0, tuple(costs)), settings, model.config)
        assert [pair["cost"] for pair in info["pairs"]]
        chosen[name] = candidates[0].layers[0]
    assert chosen["heads"]["num_attention_heads"] == first.sizes["num_attention_heads"]
    assert chosen["channels"]["num_attention_heads"] < first.sizes["num_attention_heads"]


def test_a_smaller_cache_keeps_its_heads_in_equal_layers():
    options = {**OPTIONS, "ratio": None, "params": 50_000, "kv_cache": "21KB@64"}
    report = slimgpt.prune(tiny_model("llama"), None, allocation="sensitivity", distill="off", **options)
    scheduled = slimgpt.prune(tiny_model("llama"), None, allocation="schedule", distill="off", **options)
    assert report.plan.layers == scheduled.plan.layers  # heads by the cache, channels by the limit: nothing is free
    assert report.plan.parameters <= 50_000


def test_a_folder_has_the_step_of_its_measured_widths(tokenizer, text_file, tmp_path):
    dense = tmp_path / "dense"
    tiny_model("llama", intermediate_size=1024).save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    options = {"num_samples": 24, "seq_len": 24, "device": "cpu", "distill": "off", "evaluate": False}
    options |= {"allocation": "sensitivity", "calibration": str(text_file)}

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimgpt.prune_folder(str(dense), tmp_path / "slim", 0.3, on_layer=killed, **options)
    report = slimgpt.prune_folder(str(dense), tmp_path / "slim", 0.3, resume=True, **options)
    assert report.plan.round_to == 32
    assert all(sizes["intermediate_size"] % 32 == 0 for sizes in report.plan.layers)
    assert "--round-to 32" in (tmp_path / "slim/README.md").read_text()


@pytest.mark.parametrize("uniform", [False, True])
def test_measured_widths_of_a_wide_model_are_aligned(uniform):
    model = tiny_model("llama", intermediate_size=1024)
    options = {**OPTIONS, "uniform": uniform, "distill": "off", "evaluate": False}
    report = slimgpt.prune(model, None, allocation="sensitivity", **options)
    assert report.allocation["by"] == "sensitivity"
    assert report.plan.achieved == pytest.approx(0.3, abs=0.005)
    assert report.plan.round_to > 1
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths == [sizes["intermediate_size"] for sizes in report.plan.layers]
    assert all(width % report.plan.round_to == 0 for width in widths)
