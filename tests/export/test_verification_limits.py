"""Exports that compute something else are refused, and comparisons count what they say."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import NumericalError, UsageError
from slimgpt.evaluation import peak_memory
from slimgpt.exporting import FORMATS, padded
from slimgpt.exporting.verification import verify
from slimgpt.models.source import locate
from tests.models.families import tiny_model, windows


@pytest.fixture(scope="module")
def slim(tmp_path_factory, tokenizer) -> Path:
    """A slim folder of layers of different widths."""
    model = tiny_model("llama")
    report = slimgpt.prune(model, None, ratio=0.3, device="cpu", calibration=windows())
    return slimgpt.save(model, tokenizer, report, tmp_path_factory.mktemp("slim") / "slim[v2]")


def change_norm(folder: Path, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_export_of_another_model_leaves_nothing_and_ends_with_1(slim, tmp_path, monkeypatch):
    def broken(exported, work):
        notes = padded.write(exported, work)
        change_norm(work, -20.0)
        return notes

    monkeypatch.setitem(FORMATS, "padded", replace(FORMATS["padded"], write=broken))
    result = CliRunner().invoke(app, ["export", str(slim), str(tmp_path / "out"), "--to", "padded"])
    assert result.exit_code == 1, result.output
    assert "is another model than the slim folder" in result.output
    assert not list(tmp_path.iterdir())
    result = CliRunner().invoke(app, ["export", str(slim), str(tmp_path / "out"), "--to", "padded", "--no-verify"])
    assert result.exit_code == 0
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--against", str(slim)])
    assert result.exit_code == 1, result.output
    monkeypatch.undo()
    result = CliRunner().invoke(app, ["export", str(slim), str(tmp_path / "o[v2]"), "--to", "padded"])
    assert result.exit_code == 0, result.output
    assert "o[v2]" in result.output


def test_verify_of_nan_is_an_error(slim, tmp_path):
    broken = tmp_path / "nan"
    shutil.copytree(slim, broken)
    change_norm(broken, float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        verify(broken, broken)


@pytest.mark.parametrize("kind", ["pipe", "endless link"])
def test_verify_reads_regular_files_only(kind, slim, tmp_path):
    text = tmp_path / "text.txt"
    if kind == "pipe":
        os.mkfifo(text)
    else:
        text.symlink_to(text)
    with pytest.raises(UsageError, match=r"regular files only"):
        verify(slim, slim, text=str(text))


@pytest.mark.filterwarnings("ignore:.*is read without the adapter")
def test_an_adapter_left_beside_an_export_is_not_read(slim, tmp_path):
    slimgpt.export(slim, tmp_path / "padded", "padded")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "nobody/no-such-model", "target_modules": ["q_proj"]}
    (tmp_path / "padded" / "adapter_config.json").write_text(json.dumps(settings))
    assert verify(tmp_path / "padded", slim).problem() is None
    assert peak_memory(locate(str(tmp_path / "padded")), prompt=8, new_tokens=2) > 50e6


def test_verify_takes_widths_by_layer_and_every_token_asked_for(slim):
    comparison = verify(slim, slim, max_tokens=50, window=16)
    assert comparison.identical
    assert comparison.tokens == 50 - 3  # the first token of each window without overlap has nothing before it
