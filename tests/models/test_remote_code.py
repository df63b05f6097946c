"""Models whose class comes from their repository: described, pruned, saved with their code and our widths."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import slimgpt
from slimgpt.errors import SlimGPTError
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Fused
from slimgpt.models.families import ffn, heads
from slimgpt.models.families.moe import Mixture, experts
from slimgpt.models.slicing import unit_rows
from tests.models.families import in_a_process_without_slimgpt, windows
from tests.models.remote_code import described, remote_folder

IDS = windows(2, 24, seed=5)
PACKED = heads("self_attn.o_proj", Fused("self_attn.W_pack", (HEADS, KV_HEADS, KV_HEADS), (0, 1, 2)))
DENSE = slimgpt.Architecture((PACKED, ffn("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")), resized=True)
MIXTURE = Mixture((PACKED, experts(router="mlp.router")), width=CHANNELS)
OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu", "batch_size": 3, "trust_remote_code": True}


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
out, ids, *folders = sys.argv[1:]
ids = torch.tensor(eval(ids))
results = {}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        results[folder] = model(ids).logits
        for cache in (True, False):
            made = model.generate(ids[:1], max_new_tokens=6, do_sample=False, use_cache=cache, min_new_tokens=6)
            results[f"{folder}.{cache}"] = made
assert "slimgpt" not in sys.modules
save_file(results, out)
"""


SMALL_EXPERTS = {"num_experts": 6, "intermediate_size": 40, "head_dim": 8}
CASES = {
    "layers": (DENSE, {}, {"uniform": False}),
    "uniform": (DENSE, {}, {"uniform": True}),
    "channels-of-experts": (MIXTURE, SMALL_EXPERTS, {"whole_experts": 0.0, "distill": 120}),
    "whole-experts": (MIXTURE, SMALL_EXPERTS, {"whole_experts": 1.0, "distill": 120}),
}
"""Name: the description, changes of the config, settings."""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, tokenizer, text_file):
    """The folders, the models before and after with the reports, and what one process without slimgpt reads."""
    root, models = tmp_path_factory.mktemp("remote"), {}
    for name, (architecture, changes, settings) in CASES.items():
        dense = remote_folder(root / "dense" / name, tokenizer, **changes)
        with described(architecture):
            options = {**OPTIONS, "calibration": str(text_file), **settings}
            report = slimgpt.prune_folder(str(root / "dense" / name), root / name, **options)
            slim, _ = slimgpt.load(str(root / name), trust_remote_code=True)
        models[name] = dense, slim, report
    return root, models, in_a_process_without_slimgpt(root, RELOAD, IDS, [str(root / name) for name in CASES])


@pytest.mark.parametrize("name", CASES)
def test_a_folder_loads_without_slimgpt_to_the_bit(name, pruned):
    root, models, results = pruned
    _, slim, report = models[name]
    assert sum(p.numel() for p in slim.parameters()) == report.plan.parameters
    with torch.no_grad():
        assert torch.equal(results[str(root / name)], slim(IDS).logits)
    assert torch.equal(results[f"{root / name}.True"], results[f"{root / name}.False"])


@pytest.mark.parametrize("name", ["layers", "uniform"])
def test_a_described_model_is_pruned_as_its_own_class_and_saved_with_its_code(name, pruned, text_file, tmp_path):
    root, models, _ = pruned
    dense, slim, report = models[name]
    assert report.plan.uniform == (name == "uniform")
    own = {"configuration_tiny_baichuan.py", "modeling_tiny_baichuan.py"}
    assert {file.name for file in (root / name).glob("*.py")} >= own
    # The slim model is the dense one with the removed columns zeroed, and the others repaired.
    for layer, old, new in zip(report.layers, dense.model.layers, slim.model.layers):
        sizes = report.dense_sizes[layer.layer]
        for structure in DENSE.structures:
            W = old.get_submodule(structure.output).weight.data
            units = torch.tensor(layer.kept[structure.name])
            columns = unit_rows(W.shape[1], structure.units(sizes), units)
            W.zero_()
            W[:, columns] = new.get_submodule(structure.output).weight.data
    with torch.no_grad():
        torch.testing.assert_close(dense(IDS).logits, slim(IDS).logits, rtol=1e-4, atol=1e-4)
    with described(DENSE):
        options = {**OPTIONS, "calibration": str(text_file), **CASES[name][2], "ratio": 0.2}
        again = slimgpt.prune_folder(str(root / name), tmp_path / "again", **options)
    assert again.plan.parameters < report.plan.parameters
    assert {file.name for file in (tmp_path / "again").glob("*.py")} >= own


def test_in_memory_as_from_folder_to_folder(pruned, tokenizer, text_file, tmp_path):
    root, models, _ = pruned
    options = {**OPTIONS, "calibration": str(text_file)}
    options.pop("trust_remote_code")
    with described(DENSE):
        model, _ = slimgpt.load(str(root / "dense" / "layers"), trust_remote_code=True)
        report = slimgpt.prune(model, tokenizer, **options)
        slimgpt.save(model, tokenizer, report, tmp_path / "saved")
    with torch.no_grad():
        streamed = models["layers"][1](IDS).logits
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)(IDS).logits
        torch.testing.assert_close(streamed, saved, rtol=1e-4, atol=1e-4)
        assert torch.equal(saved, model(IDS).logits)


@pytest.mark.parametrize("name", ["channels-of-experts", "whole-experts"])
def test_a_mixture_can_be_described_too(name, pruned):
    report = pruned[1][name][2]
    assert any(layer["num_experts"] < 6 for layer in report.plan.layers) == (name == "whole-experts")


def test_without_leave_no_code_runs(tokenizer, tmp_path):
    remote_folder(tmp_path / "dense", tokenizer)
    (tmp_path / "dense" / "modeling_tiny_baichuan.py").write_text("raise SystemExit('run')", encoding="utf-8")
    with pytest.raises(SlimGPTError, match="--trust-remote-code"):
        slimgpt.load(str(tmp_path / "dense"))


def test_with_leave_an_undescribed_model_is_refused_with_what_is_in_it(tokenizer, tmp_path):
    remote_folder(tmp_path / "dense", tokenizer)
    with pytest.raises(SlimGPTError, match=r"(?s)nobody has described.*W_pack"):
        slimgpt.prune_folder(str(tmp_path / "dense"), tmp_path / "slim", trust_remote_code=True, ratio=0.2)


def test_a_repository_without_a_causal_model_is_refused(tokenizer, tmp_path):
    remote_folder(tmp_path / "dense", tokenizer)
    file = tmp_path / "dense" / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    del values["auto_map"]["AutoModelForCausalLM"]
    file.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(SlimGPTError, match="names no AutoModelForCausalLM"):
        slimgpt.load(str(tmp_path / "dense"), trust_remote_code=True)


def test_a_mixture_whose_class_takes_no_width_is_not_registered():
    with pytest.raises(SlimGPTError, match="head_dim"), described(replace(MIXTURE, resized=True)):
        pass
