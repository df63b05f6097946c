"""The whole way on a real pretrained model and real text."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app

pytestmark = pytest.mark.network

RELOAD = """
import sys
sys.modules["slimgpt"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
inputs = AutoTokenizer.from_pretrained(sys.argv[1])("The state of the Union is", return_tensors="pt")
with torch.no_grad():
    outputs = {"logits": model(**inputs).logits}
    for cache in (True, False):
        outputs[f"generate.{cache}"] = model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=cache)
save_file(outputs, sys.argv[2])
"""


@pytest.fixture(scope="module")
def dense():
    return slimgpt.load("demo")


def quality(model, tokenizer):
    return slimgpt.evaluate(model, tokenizer, "demo", window=256, max_tokens=1024).perplexity


def test_smollm2_from_load_to_a_folder_that_loads_elsewhere(dense, tmp_path):
    model, tokenizer = dense
    before, numbers = quality(model, tokenizer), sum(p.numel() for p in model.parameters())
    report = slimgpt.prune(model, tokenizer, ratio=0.2, calibration="demo", num_samples=8, seq_len=256, device="cpu")
    assert report.plan.achieved == pytest.approx(0.2, abs=0.002)
    assert sum(p.numel() for p in model.parameters()) == report.plan.parameters < numbers
    after = quality(model, tokenizer)
    assert before < after < 1.6 * before

    slimgpt.save(model, tokenizer, report, tmp_path / "slim")
    weights = (tmp_path / "slim" / "model.safetensors").stat().st_size
    assert weights == pytest.approx(4 * report.plan.parameters, rel=1e-3)
    assert json.loads((tmp_path / "slim" / "slimgpt.json").read_text())["base_model"] == "SmolLM2-135M-Instruct"
    assert slimgpt.inspect(str(tmp_path / "slim")).parameters == report.plan.parameters

    script, out = tmp_path / "reload.py", tmp_path / "out.safetensors"
    script.write_text(RELOAD)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, str(script), str(tmp_path / "slim"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = load_file(out)
    with torch.no_grad():
        logits = model(**tokenizer("The state of the Union is", return_tensors="pt")).logits
    assert torch.equal(outputs["logits"], logits)
    assert torch.equal(outputs["generate.True"], outputs["generate.False"])


@pytest.mark.slow
def test_ours_beats_the_paper_and_the_paper_beats_the_baselines():
    perplexities = {}
    for method in ("slimgpt", "paper", "wanda", "magnitude"):
        model, tokenizer = slimgpt.load("demo")
        slimgpt.prune(model, tokenizer, 0.33, "demo", method=method, num_samples=32, seq_len=512, device="cpu")
        perplexities[method] = quality(model, tokenizer)
    assert perplexities["slimgpt"] < perplexities["paper"] < min(perplexities["wanda"], perplexities["magnitude"])


@pytest.mark.slow
@pytest.mark.usefixtures("whole_pictures")
def test_demo_ends_with_the_table(tmp_path):
    result = CliRunner().invoke(app, ["demo", str(tmp_path / "demo"), "--num-samples", "8", "--seq-len", "256"])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "demo" / "demo.json").read_text())
    before, after = values["dense"], values["slim"]
    for name in ("parameters", "bytes", "peak_memory"):
        assert after[name] < before[name]
    assert after["perplexity"] > before["perplexity"]
    assert f"{after['parameters']:,}" in result.output
    assert after["sample"] != before["sample"]
    assert (tmp_path / "demo" / "slim" / "widths.png").stat().st_size > 5000
    assert (tmp_path / "demo" / "slim" / "README.md").read_text().count("held-out speeches") == 1
