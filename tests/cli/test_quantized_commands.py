"""Every command on a quantised checkpoint gives what it gives on the same numbers in 16 bits."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import slimgpt
from slimgpt.evaluation.speed import peak_memory
from slimgpt.models.fingerprint import source_files
from slimgpt.models.loading import locate
from tests.cli.test_command_line import run
from tests.models.hub_cache import use_cache
from tests.models.quantized_cases import CASES, WITH_LIBRARY, exact_model, make

SMALL = ("--num-samples", 8, "--seq-len", 24, "--device", "cpu")

SETTINGS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu"}

FROM = {"quant_method": "fp8", "format": "FP8 in blocks of 2 x 4", "read_as": "bfloat16"}


def pair(case: str, root: Path, tokenizer) -> tuple[Path, Path]:
    """A quantised folder, and one of the same name with the numbers that it stands for, both with a tokenizer."""
    quantised, scheme = make(case, root, tokenizer)
    exact_model(root, scheme)
    for file in (root / "dense").glob("*token*"):
        shutil.copyfile(file, root / "exact" / file.name)
    shutil.copyfile(quantised / "generation_config.json", root / "exact/generation_config.json")
    (root / "plain").mkdir()
    (root / "exact").rename(root / "plain" / case)
    return quantised, root / "plain" / case


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    return pair("fp8-blocks", tmp_path_factory.mktemp("pair"), tokenizer)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but those that say what the model was read from."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in ("slimgpt.json", "README.md")}


IN_EVERY_RUN = (
    "fp8-blocks",
    "fp8-blocks-of-experts",
    "mxfp4",
    "compressed-packed",
    "compressed-packed-experts",
    "modelopt-nvfp4",
    "awq",
)
"""One of every form; that layers are streamed as they are loaded is held for all cases beside the readers."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in IN_EVERY_RUN)) for case in CASES]
)
def test_prune_writes_the_same_folder(case, tmp_path, tokenizer, text_file):
    if case in WITH_LIBRARY and find_spec("compressed_tensors") is None:
        pytest.skip("pip install compressed-tensors")
    quantised, plain = pair(case, tmp_path, tokenizer)
    for source, out in ((quantised, "from-quantised"), (plain, "from-plain")):
        slimgpt.prune_folder(str(source), tmp_path / out, calibration=str(text_file), **SETTINGS)
    ours = files_of(tmp_path / "from-quantised")
    assert ours == files_of(tmp_path / "from-plain")
    assert "hf_quant_config.json" not in ours
    assert b"quantization_config" not in ours["config.json"]
    assert json.loads(ours["config.json"])["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "from-quantised/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} <= {torch.bfloat16, torch.float32}
    report = json.loads((tmp_path / "from-quantised/slimgpt.json").read_text())
    assert report["quantization"]["read_as"] == "bfloat16"
    card = (tmp_path / "from-quantised/README.md").read_text()
    assert f"were quantised ({report['quantization']['format']}) and read as bfloat16." in card
    assert json.loads((tmp_path / "from-plain/slimgpt.json").read_text())["quantization"] == {}
    assert "quantised" not in (tmp_path / "from-plain/README.md").read_text()


def test_pruned_in_memory_it_is_said_too(folders, text_file, tmp_path):
    model, tokenizer = slimgpt.load(str(folders[0]))
    report = slimgpt.prune(model, tokenizer, calibration=str(text_file), **SETTINGS)
    assert report.quantization == FROM
    slimgpt.save(model, tokenizer, report, tmp_path / "slim")
    assert "FP8 in blocks of 2 x 4" in (tmp_path / "slim/README.md").read_text()
    again, _ = slimgpt.load(str(tmp_path / "slim"))
    assert not hasattr(again, "dequantized_from")


def test_a_resumed_run_compares_the_file_that_says_how_weights_are_quantised(folders, tmp_path):
    quantised = tmp_path / "quantised"
    shutil.copytree(folders[0], quantised)
    (quantised / "hf_quant_config.json").write_text("{}")
    assert quantised / "hf_quant_config.json" in source_files(locate(str(quantised)))


def test_inspect_and_plan(folders):
    values = []
    for folder in folders:
        for command in (("inspect", folder), ("plan", folder, "--ratio", 0.3)):
            done = run(*command, "--json")
            assert done.exit_code == 0, done.output
            values.append(json.loads(done.output))
            assert ("FP8 in blocks of 2 x 4; read as bfloat16" in run(*command).output) == (folder == folders[0])
    inspected, planned, plain_inspected, plain_planned = values
    assert inspected["quantization"] == planned["quantization"] == FROM
    assert plain_inspected["quantization"] is plain_planned["quantization"] is None
    assert inspected["bytes"] < plain_inspected["bytes"]
    for name in ("parameters", "layer_parameters", "layers"):
        assert inspected[name] == plain_inspected[name]
    assert planned["plan"] == plain_planned["plan"]
    assert planned["bytes"] == plain_planned["bytes"]


def test_plan_needs_no_weights(folders, tmp_path):
    shutil.copyfile(folders[0] / "config.json", tmp_path / "config.json")
    done = run("plan", tmp_path, "--ratio", 0.3, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["quantization"] == FROM


@pytest.mark.parametrize("case", ["fp8-blocks", "modelopt-fp8"])
def test_a_model_on_the_hub(case, tmp_path, tokenizer, text_file, monkeypatch):
    """As the hub's cache has it; a file that it lacks is one that the repository lacks."""
    quantised, plain = pair(case, tmp_path, tokenizer)
    snapshot = tmp_path / "hf/hub/models--some--model/snapshots/0123456789abcdef"
    shutil.copytree(quantised, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(snapshot.name)
    use_cache(monkeypatch, tmp_path / "hf/hub")
    words = ["--text", text_file, "--window", 32, "--max-tokens", 256, "--device", "cpu"]
    done = run("evaluate", "some/model", *words, "--json", tmp_path / "hub.json")
    assert done.exit_code == 0, done.output
    expected = slimgpt.evaluate(*slimgpt.load(str(plain)), str(text_file), window=32, max_tokens=256)
    assert json.loads((tmp_path / "hub.json").read_text())["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_evaluate(folders, text_file, tmp_path):
    results = []
    for folder in folders:
        words = ("--window", 32, "--max-tokens", 512, "--device", "cpu", "--json", tmp_path / folder.parent.name)
        done = run("evaluate", folder, "--text", text_file, *words)
        assert done.exit_code == 0, done.output
        results.append(json.loads((tmp_path / folder.parent.name).read_text())["perplexity"])
    assert results[0] == results[1]


def test_compare(folders, text_file, tmp_path):
    quantised, plain = folders
    done = run(
        "compare", quantised, plain, "--out", tmp_path / "out", "--text", text_file, "--window", 32,
        "--max-tokens", 512, "--no-speed", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "out/compare.json").read_text())
    one, other = values["models"]
    assert one["perplexities"][0]["perplexity"] == other["perplexities"][0]["perplexity"]
    assert one["parameters"] == other["parameters"]


def test_speed_and_its_memory(folders):
    done = run("speed", folders[0], "--prompt", 8, "--new-tokens", 2, "--rounds", 1, "--no-memory", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert peak_memory(locate(str(folders[0])), "cpu", prompt=8, new_tokens=2) > 10e6


def test_generate(folders):
    quantised, plain = (run("generate", folder, "the cat", "--max-new-tokens", 12, "--raw") for folder in folders)
    assert quantised.exit_code == 0, quantised.output
    assert quantised.stdout == plain.stdout


@pytest.mark.slow
def test_scan(folders, text_file, tmp_path):
    results = []
    for folder in folders:
        out = tmp_path / f"{folder.parent.name}-scan"
        words = ("--points", "0.1,0.3", "--num-samples", 12, "--seq-len", 24, "--device", "cpu")
        done = run("scan", folder, "--out", out, "--calibration", text_file, *words)
        assert done.exit_code == 0, done.output
        results.append(json.loads((out / "scan.json").read_text())["points"])
    assert results[0] == results[1]


def test_export(tokenizer, tmp_path):
    folders = pair("compressed-without-biases", tmp_path, tokenizer)
    for folder, name in zip(folders, ("quantised", "plain")):
        (tmp_path / f"{name}-out").mkdir()
        slimgpt.export(folder, tmp_path / f"{name}-out/model.gguf", "gguf", quantize="BF16", check=False)
        slimgpt.export(folder, tmp_path / f"{name}-out/padded", "padded", check=False)
    quantised, plain = tmp_path / "quantised-out", tmp_path / "plain-out"
    assert (quantised / "model.gguf").read_bytes() == (plain / "model.gguf").read_bytes()
    assert files_of(quantised / "padded") == files_of(plain / "padded")


def test_recover_trains_it_and_takes_it_as_the_teacher(folders, text_file, tmp_path):
    settings = {
        "max_length": 24, "batch_size": 4, "micro_batch": 4, "device": "cpu", "bf16": False, "evaluations": 1,
        "max_steps": 2,
    }  # fmt: skip
    for folder, name in zip(folders, ("quantised", "plain")):
        slimgpt.recover(folder, tmp_path / f"{name}-trained", str(text_file), method="full", **settings)
        slim = tmp_path / f"{name}-slim"
        slimgpt.prune_folder(str(folder), slim, calibration=str(text_file), **SETTINGS)
        slimgpt.recover(
            slim, tmp_path / f"{name}-taught", str(text_file), method="distill", teacher=str(folder), **settings
        )
    for result in ("trained", "taught"):
        ours = load_file(tmp_path / f"quantised-{result}/model.safetensors")
        theirs = load_file(tmp_path / f"plain-{result}/model.safetensors")
        assert ours.keys() == theirs.keys()
        for name in ours:  # training is in float32, where nothing was rounded to bfloat16 before
            torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=1e-3)


def test_an_adapter_is_merged_into_a_quantised_model(folders, tmp_path):
    peft = pytest.importorskip("peft")
    merged = []
    for folder, name in zip(folders, ("quantised", "plain")):
        model, _ = slimgpt.load(str(folder))
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
        adapted.save_pretrained(tmp_path / name)
        settings = json.loads((tmp_path / name / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(folder)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        merged.append(slimgpt.load(str(tmp_path / name))[0].state_dict())
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[1])
