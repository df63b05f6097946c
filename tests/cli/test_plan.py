"""``slimgpt plan`` on the published sizes of models that people use, from config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from slimgpt.cli import app
from slimgpt.models.build import empty_model
from slimgpt.models.families import ARCHITECTURES
from slimgpt.models.loading import load_config
from slimgpt.models.parameter_counts import count_tied
from slimgpt.models.source import locate
from slimgpt.models.stock_config import apply_sizes

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
PUBLISHED = {
    "llama-3.1-8b": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
         "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": False, "dtype": "bfloat16"},
        8_030_261_248,
    ),
    "qwen2.5-7b": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
         "tie_word_embeddings": False, "dtype": "bfloat16"},
        7_615_616_512,
    ),
    "qwen3-8b": (
        {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
         "max_position_embeddings": 40960,
         "tie_word_embeddings": False, "dtype": "bfloat16"},
        8_190_735_360,
    ),
    "mistral-7b": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768,
         "sliding_window": None, "tie_word_embeddings": False, "dtype": "bfloat16"},
        7_248_023_552,
    ),
    "gemma-3-4b": (
        {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
         "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
         "max_position_embeddings": 131072, "sliding_window": 1024, "dtype": "bfloat16"},
        3_880_263_168,
    ),
}  # fmt: skip
MIXTRAL = {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with nothing but a published config."""

    def make(name):
        (tmp_path / name).mkdir()
        config = MIXTRAL if name == "mixtral" else PUBLISHED[name][0]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    return make


def plan(*words):
    return CliRunner().invoke(app, ["plan", *map(str, words)])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("target", [("--ratio", "0.3"), ("--ratio", "0.25", "--uniform", "--round-to", "64")])
def test_published_sizes(name, target, folder):
    path = folder(name)
    result = plan(path, *target, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["plan"]["parameters_before"] == PUBLISHED[name][1]
    config = load_config(locate(str(path)))
    model = empty_model(config)
    apply_sizes(model, ARCHITECTURES[config.model_type], [dict(layer) for layer in report["plan"]["layers"]])
    assert count_tied(empty_model(model.config)) == report["plan"]["parameters"]
    assert report["bytes"]["bfloat16"] == 2 * report["plan"]["parameters"]
    q8 = report["gguf_bytes"]["Q8_0"] / report["plan"]["parameters"]
    assert q8 == pytest.approx(8.5 / 8, rel=0.01) if "--uniform" in target else 8.5 / 8 <= q8 < 1.5  # odd rows stay F16
    assert {verdict["engine"] for verdict in report["verdicts"]} == {"hf", "vllm", "llama.cpp", "sglang", "mlx", "onnx"}


def test_targets_on_a_published_size(folder):
    path = folder("llama-3.1-8b")
    for step, options in ((1, ("--round-to", 1)), (64, ())):  # of 14,336 channels
        report = json.loads(plan(path, "--params", "6.5B", "--json", *options).output)
        assert 6_500_000_000 - step * 3 * 4096 <= report["plan"]["parameters"] <= 6_500_000_000
        assert all(sizes["intermediate_size"] % step == 0 for sizes in report["plan"]["layers"])
    report = json.loads(plan(path, "--bytes", "13GB", "--json").output)
    assert 12.99e9 < 2 * report["plan"]["parameters"] <= 13e9
    report = json.loads(plan(path, "--kv-cache", "2GB@32k", "--json").output)
    assert report["kv_before"] == 131072
    assert report["kv_after"] * 32768 <= 2e9
    result = plan(path, "--params", "6.5B", "--for", "vllm,llama.cpp")
    assert result.exit_code == 0, result.output
    assert "0-31" in result.output  # one row: all layers are equal


def test_saved_plans_are_read_back(folder, tmp_path):
    path = folder("qwen2.5-7b")
    assert plan(path, "--ratio", "0.2", "--save", tmp_path / "plan.toml").exit_code == 0
    assert 'model_type = "qwen2"' in (tmp_path / "plan.toml").read_text()
    assert plan(path, "--ratio", "0.2", "--save", tmp_path / "plan.toml").exit_code == 2
    nowhere = plan(path, "--ratio", "0.2", "--save", tmp_path / "no" / "plan.toml")
    assert nowhere.exit_code == 2
    assert "give another place for --save" in " ".join(nowhere.stderr.split())


def test_a_mixture_of_experts_is_planned_from_its_config(folder):
    result = plan(folder("mixtral"), "--ratio", "0.2")
    assert result.exit_code == 0, result.output
    assert "20.0" in result.output


def test_an_engine_that_was_asked_for_and_does_not_run_it_is_an_error(folder):
    given = (folder("mixtral"), "--ratio", "0.2")
    refused = plan(*given, "--for", "llama.cpp")
    assert refused.exit_code == 2
    assert "engines" in refused.stdout  # the table all the same
    assert (
        "llama.cpp does not run it: model_type 'mixtral' is none that our GGUF writer knows; use prune --uniform"
        in (" ".join(refused.stderr.split()))
    )
    listed = plan(*given, "--for", "llama.cpp", "--json")
    assert listed.exit_code == 2
    assert not json.loads(listed.stdout)["verdicts"][0]["runs"]
    assert plan(*given).exit_code == 0  # nobody asked for it


def test_no_weight_is_loaded_and_nothing_that_takes_long(folder):
    """A whole process. Its seconds are the imports of torch and transformers; what else is large stays out."""
    path = folder("llama-3.1-8b")
    code = "import sys; from slimgpt.cli import app; app(standalone_mode=False); print(*sys.modules, sep=chr(10))"
    words = [sys.executable, "-c", code, "plan", str(path), "--ratio", "0.3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.splitlines())
    assert {"torch", "transformers", "slimgpt.planning"} <= imported
    large = {"datasets", "gguf", "lm_eval", "matplotlib", "pandas", "peft", "pyarrow", "sklearn"}
    assert imported & {*large, "slimgpt.recovery.run", "slimgpt.comparison"} == set()
    assert [file.name for file in path.iterdir()] == ["config.json"]


def test_engines_of_equal_layers_get_the_largest_step_that_meets_the_target(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 4, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 50,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    reports = {}
    for name, options in {
        "vllm": ("--for", "vllm"),
        "given": ("--for", "vllm", "--round-to", 64),
        "by layer": (),
        "llama.cpp": ("--for", "llama.cpp"),
        "paper": ("--method", "paper"),
        "paper in vllm": ("--method", "paper", "--for", "vllm"),
        "half": ("--for", "vllm", "--ratio", 0.5),
    }.items():
        ratio = () if "--ratio" in options else ("--ratio", 0.2)
        result = plan(tmp_path, *ratio, *options, "--json")
        assert result.exit_code == 0, result.output
        reports[name] = json.loads(result.output)
    steps = {name: each["plan"]["round_to"] for name, each in reports.items()}
    assert steps == {
        "vllm": 32, "given": 64, "by layer": 32, "llama.cpp": 32, "paper": 1, "paper in vllm": 64, "half": 64,
    }  # fmt: skip
    for name, step in steps.items():
        assert all(sizes["intermediate_size"] % step == 0 for sizes in reports[name]["plan"]["layers"])
    assert reports["vllm"]["plan"]["achieved"] == pytest.approx(0.2031, abs=1e-4)
    assert reports["given"]["plan"]["achieved"] == pytest.approx(0.1874, abs=1e-4)  # no pair is nearer
    assert reports["by layer"]["plan"]["achieved"] == pytest.approx(0.2, abs=0.002)
    assert reports["half"]["plan"]["achieved"] == pytest.approx(0.5, abs=0.005)
    assert "multiples of 64 they would miss" in reports["vllm"]["note"]
    assert "multiples of 64 allow no nearer share" in reports["given"]["note"]
    assert reports["by layer"]["note"] is None
    shown = " ".join(plan(tmp_path, "--ratio", 0.2, "--for", "vllm").stdout.split())
    assert "FFN widths are multiples of 32" in shown
