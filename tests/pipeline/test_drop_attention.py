"""A model whose layers lose their attention, through every command."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from tests.models.families import tiny_model
from tests.pipeline.test_to_folder import files_of, report_of

OPTIONS = {
    "ratio": 0.3, "num_samples": 24, "seq_len": 32, "batch_size": 5, "device": "cpu", "drop_attention": True,
    "distill": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory, tokenizer):
    """A Llama whose attention adds nothing in two layers."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.o_proj.bias.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def slim(dense, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slim") / "slim"
    slimgpt.prune_folder(str(dense), folder, calibration=str(text_file), **OPTIONS)
    return folder


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_streamed_is_as_in_memory_and_says_what_is_gone(dense, slim, text_file):
    report = json.loads((slim / "slimgpt.json").read_text())
    assert [layer["sizes"]["num_attention_heads"] == 0 for layer in report["layers"]] == [False, False, True, True]
    assert report["settings"]["drop_attention"] is True
    assert report["distillation"]["tokens"]
    assert "--drop-attention" in (slim / "README.md").read_text()
    model, tokenizer = slimgpt.load(str(dense))
    slimgpt.prune(model, tokenizer, calibration=str(text_file), **OPTIONS)
    loaded = slimgpt.load(str(slim))[0]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_killed_and_resumed_is_the_same_to_the_byte(dense, slim, text_file, tmp_path):
    class Killed(BaseException):
        pass

    def kill(report, _plan):
        if report.layer == 2:
            raise Killed

    with pytest.raises(Killed):
        slimgpt.prune_folder(str(dense), tmp_path / "slim", calibration=str(text_file), on_layer=kill, **OPTIONS)
    slimgpt.prune_folder(str(dense), tmp_path / "slim", calibration=str(text_file), resume=True, **OPTIONS)
    assert files_of(tmp_path / "slim") == files_of(slim)
    assert report_of(tmp_path / "slim") == report_of(slim)


def test_a_plan_of_it_is_followed(dense, slim, text_file, tmp_path):
    from slimgpt.models.lookup import layer_sizes
    from slimgpt.models.parameter_counts import describe
    from slimgpt.planning.plan import plan_of_widths
    from slimgpt.planning.plan_file import to_toml

    config = slimgpt.load(str(dense))[0].config
    sizes = layer_sizes(slimgpt.load(str(slim))[0].config)
    unit = json.loads((slim / "slimgpt.json").read_text())["plan"]["head_unit"]
    (tmp_path / "plan.toml").write_text(to_toml(plan_of_widths(describe(config), sizes, unit), "llama"))
    run("prune", dense, tmp_path / "out", "--plan", tmp_path / "plan.toml", "--calibration", text_file,
        "--num-samples", 8, "--seq-len", 32, "--device", "cpu")  # fmt: skip
    assert layer_sizes(slimgpt.load(str(tmp_path / "out"))[0].config) == sizes


def test_every_command_takes_it(slim, dense, text_file, tmp_path):
    inspected = slimgpt.inspect(slim)
    assert [layer.sizes["num_key_value_heads"] for layer in inspected.layers][2:] == [0, 0]
    run("inspect", slim)
    run(
        "evaluate", slim, "--text", text_file, "--window", 32, "--max-tokens", 500, "--json", tmp_path / "evaluate.json"
    )
    run("speed", slim, "--prompt", 8, "--new-tokens", 4, "--batch", 1, "--rounds", 1, "--no-memory")
    run("compare", dense, slim, "--text", text_file, "--window", 32, "--max-tokens", 500, "--no-speed",
        "--out", tmp_path / "comparison")  # fmt: skip
    run("recover", slim, tmp_path / "trained", "--data", text_file, "--max-steps", 2, "--max-length", 32)
    trained = slimgpt.load(str(tmp_path / "trained"))[0]
    assert not list(trained.model.layers[3].self_attn.parameters())
    run("prune", slim, tmp_path / "again", "--ratio", 0.1, "--calibration", text_file, "--num-samples", 24,
        "--seq-len", 32, "--device", "cpu", "--verbose")  # fmt: skip
    run("export", slim, tmp_path / "padded", "--to", "padded")
    run("verify", tmp_path / "padded", "--against", slim)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = slimgpt.load(str(slim))[0](ids).logits
        again = slimgpt.load(str(tmp_path / "padded"))[0](ids).logits
    torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-5)
