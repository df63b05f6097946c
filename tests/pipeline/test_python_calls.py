"""What Python callers have beside the command line: texts and rows in memory, bars of progress."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

import slimgpt
from slimgpt.errors import CalibrationError
from tests.models.families import tiny_model

OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu"}


def same_weights(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values()))


@pytest.fixture(scope="module")
def lines(text_file) -> list[str]:
    return text_file.read_text(encoding="utf-8").splitlines()


def test_texts_rows_and_data_sets_are_what_a_file_of_them_is(lines, tokenizer, tmp_path):
    file = tmp_path / "text.jsonl"
    rows = [{"text": line} for line in lines]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = tiny_model("llama")
    on_file = slimgpt.prune(expected, tokenizer, calibration=str(file), **OPTIONS)
    for calibration in (lines, rows, Dataset.from_list(rows), (line for line in lines)):
        model = tiny_model("llama")
        report = slimgpt.prune(model, tokenizer, calibration=calibration, **OPTIONS)
        assert same_weights(model, expected)
        assert report.calibration["sha256"] == on_file.calibration["sha256"]
        assert (report.calibration["source"], report.calibration["dataset"]) == ("rows", None)


def test_a_row_without_text_is_named(lines, tokenizer):
    with pytest.raises(CalibrationError, match="row 1 of calibration has no `text`"):
        slimgpt.prune(tiny_model("llama"), tokenizer, calibration=[lines[0], {"words": 3}], **OPTIONS)
    with pytest.raises(CalibrationError, match="'rows' gives"):
        slimgpt.prune(tiny_model("llama"), tokenizer, calibration=lines[:1], **OPTIONS)


def test_folders_take_them_too(lines, tokenizer, dense_folder, tmp_path):
    slimgpt.prune_folder(str(dense_folder), tmp_path / "slim", calibration=lines, **OPTIONS)
    model = slimgpt.load(str(dense_folder))[0]
    slimgpt.prune(model, tokenizer, calibration=lines, **OPTIONS)
    assert same_weights(slimgpt.load(str(tmp_path / "slim"))[0], model)
    assert "--calibration rows" in (tmp_path / "slim/README.md").read_text()


def test_bars_and_callbacks_see_the_same_steps(lines, tokenizer, capsys):
    steps = []
    slimgpt.prune(
        tiny_model("llama"),
        tokenizer,
        calibration=lines,
        distill=48,
        allocation="sensitivity",
        progress=True,
        on_layer=lambda report, _plan: steps.append(report.layer),
        **OPTIONS,
    )
    assert steps == [0, 1, 2, 3]
    shown = capsys.readouterr().err
    for phase in ("measuring", "pruning", "training"):
        assert f"{phase}: 100%" in shown
    slimgpt.prune(tiny_model("llama"), tokenizer, calibration=lines, **OPTIONS)
    assert capsys.readouterr().err == ""
