"""The commands as a user types them: what they leave, and how they refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.models import ARCHITECTURES
from tests.models.families import LAYERS, tiny_model


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def prune(dense_folder, text_file, tmp_path):
    """Run ``slimgpt prune`` on the tiny model; returns the result and the output folder."""

    def call(*options, model=dense_folder, out="slim", calibration=text_file):
        folder = tmp_path / out
        small = ["--calibration", calibration, "--num-samples", 8, "--seq-len", 24, "--device", "cpu"]
        return run("prune", model, folder, *small, *options), folder

    return call


@pytest.fixture
def refused(prune, tmp_path):
    """Check that a request is refused with exit code 2 and a message, and that nothing is left behind."""

    def call(message, *options, **arguments):
        before = sorted(tmp_path.rglob("*"))
        result, _ = prune(*options, **arguments)
        text = " ".join((result.stdout + result.stderr).split())
        assert result.exit_code == 2, text
        assert message in text
        assert "Traceback" not in text
        assert sorted(tmp_path.rglob("*")) == before
        return text

    return call


@pytest.mark.usefixtures("whole_pictures")
def test_prune_writes_a_whole_folder(prune, dense_folder):
    result, folder = prune("--ratio", 0.3)
    assert result.exit_code == 0, result.output
    names = {file.name for file in folder.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "slimgpt.json", "README.md",
                     "widths.png", "modeling_slim.py", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert (folder / "widths.png").stat().st_size > 5000
    report = json.loads((folder / "slimgpt.json").read_text())
    assert report["settings"]["seed"] == 0
    assert len(report["layers"]) == LAYERS
    assert {"kept", "error", "seconds", "sizes"} <= set(report["layers"][0])
    assert len(report["calibration"]["sha256"]) == 64
    assert torch.__version__.startswith(report["versions"]["torch"])  # builds add +cpu, +cu128
    assert "slimgpt prune" in (folder / "README.md").read_text()
    assert str(dense_folder.parent) not in (folder / "README.md").read_text()
    model, _ = slimgpt.load(str(folder))
    assert sum(p.numel() for p in model.parameters()) == report["plan"]["parameters"]
    assert f"{report['plan']['parameters']:,}" in result.output


@pytest.mark.parametrize("method", ["slimgpt", "paper", "magnitude", "wanda", "random"])
def test_methods(method, prune):
    result, folder = prune("--method", method)
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "slimgpt.json").read_text())["settings"]["method"] == method


@pytest.mark.parametrize("schedule", ["log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease"])
def test_schedules(schedule, prune):
    result, folder = prune("--schedule", schedule, "--ratio", 0.3)
    assert result.exit_code == 0, result.output
    ratios = json.loads((folder / "slimgpt.json").read_text())["plan"]["ratios"]
    assert sum(ratios) / LAYERS == pytest.approx(0.3)


def test_listed_schedule(prune):
    result, folder = prune("--schedule", "0,0.1,0.2,0.5")
    assert result.exit_code == 0, result.output
    layers = json.loads((folder / "slimgpt.json").read_text())["plan"]["layers"]
    assert layers[0] == {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 52}
    assert layers[3]["intermediate_size"] < 40


def test_uniform_round_to_and_head_unit(prune):
    result, folder = prune("--uniform", "--round-to", 4, "--ratio", 0.3)
    assert result.exit_code == 0, result.output
    assert not (folder / "modeling_slim.py").exists()
    assert AutoModelForCausalLM.from_pretrained(folder).config.intermediate_size % 4 == 0
    for unit in ("kv", "query"):
        result, folder = prune("--head-unit", unit, "--ratio", 0.4, "--schedule", "uniform", out=unit)
        assert result.exit_code == 0, result.output
        sizes = json.loads((folder / "slimgpt.json").read_text())["plan"]["layers"][0]
        assert (sizes["num_key_value_heads"] < 3) == (unit == "kv")


def test_the_same_request_gives_the_same_bytes(prune, text_file, tmp_path):
    documents = tmp_path / "documents.jsonl"
    lines = text_file.read_text(encoding="utf-8").splitlines()
    documents.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    _, first = prune("--seed", 3, out="first", calibration=documents)
    _, second = prune("--seed", 3, out="second", calibration=documents)
    _, other = prune("--seed", 4, out="other", calibration=documents)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]


def test_overwrite(prune):
    prune("--ratio", 0.2)
    result, folder = prune("--ratio", 0.4, "--overwrite")
    assert result.exit_code == 0, result.output
    assert json.loads((folder / "slimgpt.json").read_text())["plan"]["ratio"] == pytest.approx(0.4)


def test_evaluate_writes_the_protocol(dense_folder, text_file, tmp_path):
    file = tmp_path / "result.json"
    result = run("evaluate", dense_folder, "--text", text_file, "--window", 32, "--max-tokens", 640, "--json", file)
    assert result.exit_code == 0, result.output
    values = json.loads(file.read_text())
    assert values["window"] == 32
    assert values["tokens"] == 640
    assert values["perplexity"] > 1
    assert values["protocol"]["dtype"] == "float32"
    again = run("evaluate", dense_folder, "--text", text_file, "--json", file)
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_evaluate_takes_a_slim_folder(prune, text_file):
    _, slim = prune("--ratio", 0.3)
    result = run("evaluate", slim, "--text", text_file, "--window", 32, "--max-tokens", 640)
    assert result.exit_code == 0, result.output
    model, tokenizer = slimgpt.load(str(slim))
    expected = slimgpt.evaluate(model, tokenizer, str(text_file), window=32, max_tokens=640).perplexity
    assert f"perplexity {expected:.4f} at window 32" in result.output


def test_version():
    assert run("--version").output == f"slimgpt {slimgpt.__version__}\n"


def test_inspect(prune, dense_folder):
    _, slim = prune("--ratio", 0.3)
    for folder in (dense_folder, slim):
        assert run("inspect", folder).exit_code == 0
    values = json.loads(run("inspect", slim, "--json").stdout)
    assert values["pruned"]["plan"]["achieved"] == pytest.approx(0.3, abs=0.01)
    assert values["parameters"] == sum(tensor.numel() for tensor in load_file(slim / "model.safetensors").values())
    assert values["bytes"] == (slim / "model.safetensors").stat().st_size
    assert json.loads(run("inspect", dense_folder, "--json").stdout)["pruned"] is None
    assert run("inspect", dense_folder / "nothing").exit_code == 2


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.1", "nan"])
def test_ratio_outside_its_range(ratio, refused):
    refused("outside (0, 1)", "--ratio", ratio)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("without a head", ["--ratio", "0.97"]),
        ("schedule 'cosine' is unknown", ["--schedule", "cosine"]),
        ("lists 2 ratios, but the model has 4 layers", ["--schedule", "0.1,0.2"]),
        ("neither a name nor a list", ["--schedule", "0.1,many"]),
        ("method 'best' is unknown", ["--method", "best"]),
        ("--head-unit 'both' is unknown", ["--head-unit", "both"]),
        ("fewer than", ["--round-to", "512"]),
        ("must be at least 1", ["--num-samples", "0"]),
        ("must be 0 or more", ["--damping", "-1"]),
        ("dtype 'int3' is unknown", ["--dtype", "int3"]),
        ("device 'cuda:99' cannot be used", ["--device", "cuda:99"]),
        ("longer than the model's context", ["--seq-len", "65", "--num-samples", "2"]),
        ("less than what the headers of the files take", ["--bytes", "800"]),
        ("leave out --schedule, --head-unit", ["--plan", __file__, "--head-unit", "kv"]),
    ],
)
def test_bad_options(message, options, refused):
    refused(message, *options)


def test_too_little_text_names_both_numbers(refused, tmp_path):
    (tmp_path / "short.txt").write_text("the river runs past the old mill")
    text = refused("192", calibration=tmp_path / "short.txt")
    assert "tokens, but 8 windows of 24 need" in text
    refused("no such text", calibration=tmp_path / "nothing.txt")


def test_unknown_models(refused, tmp_path, monkeypatch):
    refused("no such folder", model=tmp_path / "nothing")
    refused("no such GGUF file", model=tmp_path / "nothing.gguf")
    (tmp_path / "empty").mkdir()
    refused("no config.json", model=tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("there is no folder nobody/no-such-model here, and from the hub", model="nobody/no-such-model")


def test_a_family_that_is_refused_says_why(refused, tmp_path):
    folder = tmp_path / "mamba"
    config = AutoConfig.for_model("mamba", num_hidden_layers=2, hidden_size=16, vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text = refused("model_type 'mamba' is not supported", model=folder)
    assert "neither attention nor a feed-forward network" in text


def test_a_family_that_nobody_has_described_shows_what_is_in_it(refused, tmp_path, monkeypatch):
    folder = tmp_path / "gpt2"
    config = AutoConfig.for_model("gpt2", n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    monkeypatch.delitem(ARCHITECTURES, "gpt2")
    text = refused("model_type 'gpt2' is not supported", model=folder)
    assert "docs/adding-a-family.md" in text
    assert "transformer.h.0..1 (2 layers): GPT2Block" in text
    assert "attn.c_attn: Conv1D weight (16, 48), bias (48,)" in text


def test_output_that_exists(refused, tmp_path):
    folder = tmp_path / "slim"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    refused("exists")
    refused("holds no model", "--overwrite")
    assert (folder / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("")
    refused("is a file", out="file")


@pytest.mark.parametrize("out", ["models/dense", "models"])
def test_the_model_that_is_read_is_never_replaced(out, refused, dense_folder, tmp_path):
    model = shutil.copytree(dense_folder, tmp_path / "models/dense")
    shutil.copy(model / "config.json", tmp_path / "models")
    refused("the model that is read", "--overwrite", model=model, out=out)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "speed-table.json"])
def test_nothing_that_the_run_reads_is_replaced(name, refused, dense_folder, text_file, tmp_path):
    """A text, a plan, a table and a teacher that lie inside the folder to be replaced."""
    old = shutil.copytree(dense_folder, tmp_path / "slim")
    shutil.copy(text_file, old / name)
    refused(f"holds {name}, which", "--overwrite", "--plan", old / name)
    refused(f"holds {name}, which", "--overwrite", "--speed-table", old / name, "--speedup", 1.2)
    shutil.copy(text_file, old / "merges.txt")
    refused("holds merges.txt, which", "--overwrite", calibration=old / "merges.txt")


def test_the_teacher_is_never_replaced(dense_folder, text_file, tmp_path):
    slim, teacher = (shutil.copytree(dense_folder, tmp_path / name) for name in ("slim", "teacher"))
    words = ["--data", text_file, "--method", "distill", "--teacher", teacher, "--max-length", 16, "--overwrite"]
    result = run("recover", slim, teacher, *words, "--max-steps", 1, "--device", "cpu")
    assert result.exit_code == 2
    assert "the model that is read" in " ".join(result.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slim", "teacher"]


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_a_foreign_folder_where_a_run_would_work_stays(kind, refused, tmp_path):
    work = tmp_path / ".slim.unfinished"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    if kind == "folder":
        other.rename(work)
    elif kind == "link":
        work.symlink_to(other)
    else:
        work.write_text("precious")
    for options in ([], ["--resume"], ["--overwrite"]) if kind == "folder" else (["--overwrite"],):
        refused("no run of ours has made it", "--ratio", 0.3, *options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--ratio", "0.1", "--kv-cache", "20KB@64"], "the KV cache asked for takes more"),
        (["--ratio", "0.1", "--uniform"], "equal layers allow no nearer share"),
        (["--ratio", "0.2", "--round-to", "13"], "multiples of 13 allow no nearer share"),
    ],
)
def test_a_share_that_was_not_met_is_explained(options, why, prune):
    text = " ".join(prune(*options, "--allocation", "schedule")[0].stdout.split())
    assert why in text


def test_tables_fit_into_80_columns(prune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result, folder = prune("--ratio", "0.3")
    assert "…" not in result.stdout
    timed = run("speed", folder, "--prompt", 8, "--new-tokens", 2, "--rounds", 1, "--no-memory", "--device", "cpu")
    assert timed.exit_code == 0, timed.output
    assert "…" not in timed.stdout
    parameters = json.loads((folder / "slimgpt.json").read_text())["plan"]["parameters"]
    assert f"{parameters:,}" in timed.stdout


def test_full_disk_before_the_work(refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    refused("GB free")


def test_full_disk_in_the_middle(dense_folder, text_file, tmp_path):
    """No file may grow past 20 kB: writing the weights fails, as on a full disk."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "sys.argv[0] = 'slimgpt'; from slimgpt.cli import main; main()"
    )
    words = ["prune", dense_folder, tmp_path / "slim", "--calibration", text_file, "--num-samples", "4",
             "--seq-len", "24", "--device", "cpu"]  # fmt: skip
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path.parent)}
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert "nothing was left there" in " ".join(done.stderr.split())
    assert list(tmp_path.iterdir()) == []


def damaged(dense_folder, folder, name, value):
    """A copy of the tiny model with one number of one tensor replaced."""
    shutil.copytree(dense_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_name_the_layer(value, refused, dense_folder, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    refused(name, model=damaged(dense_folder, tmp_path / "bad", name, value))


def test_activations_that_overflow_name_the_layer(refused, dense_folder, tmp_path):
    folder = damaged(dense_folder, tmp_path / "bad", "model.layers.1.mlp.gate_proj.weight", 3e38)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"].fill_(3e38)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("layer 1", model=folder)


@pytest.mark.parametrize("how", ["cut short", "noise", "pickle only"])
def test_files_that_cannot_be_read(how, refused, dense_folder, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(dense_folder, folder)
    file = folder / "model.safetensors"
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "noise":
        file.write_bytes(os.urandom(5000))
    else:
        file.rename(folder / "pytorch_model.bin")
    refused("never read" if how == "pickle only" else "no readable safetensors", model=folder)


def test_missing_weights_are_not_made_up(refused, dense_folder, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(dense_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused("model.layers.3.mlp.down_proj.weight", model=folder)


def test_weights_of_other_shapes_and_no_tokenizer_are_named(refused, dense_folder, tmp_path):
    folder = shutil.copytree(dense_folder, tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    refused("model.layers.0.mlp.down_proj.weight is (48, 52) in the files and (48, 50) by the config", model=folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink(missing_ok=True)
    refused("has none of tokenizer.json", model=folder)


def test_remote_code_is_refused_without_the_flag(refused, dense_folder, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(dense_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code must not run')")
    refused("--trust-remote-code", model=folder)


def test_ctrl_c_leaves_no_folder_that_looks_finished(tmp_path, tokenizer, text_file):
    model = tiny_model("llama", num_hidden_layers=32, hidden_size=96, intermediate_size=700)  # a second or two
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    words = ["prune", tmp_path / "dense", tmp_path / "slim", "--calibration", text_file, "--num-samples", "60",
             "--seq-len", "60", "--device", "cpu"]  # fmt: skip
    command = [sys.executable, "-u", "-m", "slimgpt", *map(str, words)]
    pipe = subprocess.PIPE

    def heed() -> None:  # where tests run in a shell's background, Ctrl-C is ignored and so it is by their children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, preexec_fn=heed, stdout=pipe, stderr=pipe, text=True) as process:
        for line in process.stdout:
            if line.startswith("pruning  layer "):
                process.send_signal(signal.SIGINT)
                break
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "--resume" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".slim.unfinished", "dense"]
    assert list((tmp_path / ".slim.unfinished").rglob("config.json")) == []
