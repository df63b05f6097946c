"""What must hold for every family: replay, pruning as zeroing, and reloading without slimgpt."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import slimgpt
from slimgpt.models import ARCHITECTURES
from slimgpt.models.heterogeneous import layer_sizes
from slimgpt.models.slicing import unit_rows
from slimgpt.pruning.capture import capture, run_layer, run_to, run_with
from slimgpt.pruning.memory import Shelf
from tests.families import tiny_model, windows

FAMILIES = list(ARCHITECTURES)
CASES = [(family, unit) for family in FAMILIES for unit in ("kv", "query")]
IDS = windows(2, 24, seed=7)

RELOAD = """
import json, sys
sys.modules["slimgpt"] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
out, ids, found = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), {}
for folder in sys.argv[3:]:
    name, trust = folder.rsplit("/", 1)[1], "uniform" not in folder
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, attn_implementation="eager").eval()
    with torch.no_grad():
        found[f"{name}.logits"] = model(ids).logits
        for cache in (True, False):
            found[f"{name}.generate.{cache}"] = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache
            )
    found[f"{name}.stock"] = torch.tensor(type(model).__module__.startswith("transformers.models."))
save_file({key: value.contiguous() for key, value in found.items()}, out)
"""


def prune(model, **options):
    options = {"ratio": 0.3, "calibration": windows(), "batch_size": 5, "device": "cpu", **options}
    return slimgpt.prune(model, None, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_layers_is_the_models_own_forward(family):
    model = tiny_model(family)
    with torch.no_grad():
        expected = model.model(IDS, use_cache=False).last_hidden_state
        stream = capture(model, model.model.layers, IDS, 1, Shelf("device", torch.device("cpu")))
        assert len(stream) == 2
        for number in range(2):
            hidden = stream.hidden.get(number)
            for index, layer in enumerate(model.model.layers):
                kwargs = stream.arguments[number][index]
                whole = run_layer(layer, hidden, kwargs)
                results = {}
                for structure in ARCHITECTURES[family].chosen("kv"):
                    linear = layer.get_submodule(structure.output)
                    part = run_with(layer, results, hidden, kwargs, until=structure.output)
                    results[part.place] = part.rebuild(linear(part.inputs))
                assert torch.equal(run_with(layer, results, hidden, kwargs), whole)
                hidden = whole
            torch.testing.assert_close(model.model.norm(hidden)[0], expected[number], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "unit"), CASES)
def test_slim_model_is_the_dense_one_with_pruned_columns_zeroed(family, unit):
    model = tiny_model(family).double()
    masked = copy.deepcopy(model)
    report = prune(model, head_unit=unit, calibration=windows())
    assert [dict(s) for s in report.plan.layers] == layer_sizes(model.config)
    architecture = ARCHITECTURES[family]
    for layer, dense, slim in zip(report.layers, masked.model.layers, model.model.layers):
        for structure in architecture.chosen(unit):
            name = structure.name
            W = dense.get_submodule(structure.output).weight.data
            units = structure.units(report.dense_sizes[layer.layer])
            columns = unit_rows(W.shape[1], units, torch.tensor(layer.kept[name]))
            W.zero_()
            W[:, columns] = slim.get_submodule(structure.output).weight.data
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, masked(IDS).logits, rtol=1e-9, atol=1e-9)
    assert report.layers[-1].parameters < report.layers[-1].parameters_before
    assert report.plan.parameters == sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """Every family pruned and saved both ways, and what a process without slimgpt computes from the folders."""
    root = tmp_path_factory.mktemp("families")
    expected, reports = {}, {}
    for family in FAMILIES:
        for form in ("layers", "uniform"):
            model = tiny_model(family)
            report = prune(model, uniform=form == "uniform", head_unit="kv" if form == "layers" else "auto")
            name = f"{family}-{form}"
            slimgpt.save(model, None, report, root / name)
            with torch.no_grad():
                expected[name] = model(IDS).logits
            reports[name] = report
    script = root / "reload.py"
    script.write_text(RELOAD)
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, str(script), str(root / "out.safetensors"), json.dumps(IDS.tolist())]
    folders = [str(root / name) for name in expected]
    done = subprocess.run(command + folders, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, expected, reports, load_file(root / "out.safetensors")


@pytest.mark.parametrize("form", ["layers", "uniform"])
@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_without_slimgpt_to_the_bit(family, form, reloaded):
    root, expected, reports, found = reloaded
    name = f"{family}-{form}"
    assert torch.equal(found[f"{name}.logits"], expected[name])
    assert torch.equal(found[f"{name}.generate.True"], found[f"{name}.generate.False"])
    assert bool(found[f"{name}.stock"]) == (form == "uniform")
    assert (root / name / "modeling_slim.py").is_file() == (form == "layers")
    assert "per_layer_config" not in json.loads((root / name / "config.json").read_text()) or form == "layers"
    weights = load_file(root / name / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == reports[name].plan.parameters


def test_a_llama_whose_heads_do_not_divide_the_hidden_size_becomes_a_mistral(tmp_path):
    options = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 8}
    model = tiny_model("llama", **options, attention_bias=False, mlp_bias=False)
    report = prune(model, uniform=True, ratio=0.2)
    assert 56 % report.plan.layers[0]["num_attention_heads"] != 0
    slimgpt.save(model, None, report, tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert config["sliding_window"] is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_slim_model_can_be_pruned_again(family, tmp_path):
    model = tiny_model(family)
    first = prune(model, ratio=0.2)
    slimgpt.save(model, None, first, tmp_path / "first")
    second = prune(model, ratio=0.2)
    assert second.plan.parameters < first.plan.parameters
    assert abs(second.plan.achieved - 0.2) < 0.01
    slimgpt.save(model, None, second, tmp_path / "second")
    from slimgpt.models.loading import load_config, load_model, locate

    source = locate(str(tmp_path / "second"))
    again = load_model(source, load_config(source))
    again.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_attention_implementation_reaches_the_layers(family):
    model = tiny_model(family)
    prune(model)
    with torch.no_grad():
        eager = model(IDS).logits
        model.set_attn_implementation("sdpa")
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}
        torch.testing.assert_close(model(IDS).logits, eager, rtol=1e-4, atol=1e-4)


def test_run_to_stops_before_the_output_matrix():
    model = tiny_model("llama")
    stream = capture(model, model.model.layers, IDS, 2, Shelf("device", torch.device("cpu")))
    seen = []
    linear = model.model.layers[0].self_attn.o_proj
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        run_layer(model.model.layers[0], stream.hidden.get(0), stream.arguments[0][0])
        part = run_to(model.model.layers[0], "self_attn.o_proj", stream.hidden.get(0), stream.arguments[0][0])
    assert torch.equal(part.inputs, seen[0])
    assert len(seen) == 1
