"""What a run says of its loss against Hugging Face's own forward passes of the dense and the saved model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt import assets
from slimgpt.calibration.evaluation_text import BUNDLED, HELD_OUT, evaluation_texts
from slimgpt.calibration.windows import CalibrationText, calibration_windows, evaluation_tokens
from slimgpt.cli import app
from slimgpt.config import make_config
from slimgpt.models.loading import load
from tests.models.families import CORE, tiny_model

OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu", "batch_size": 3}
TRAINED = {**OPTIONS, "num_samples": 24, "distill": 400}


def texts_of(tokenizer, text_file, options):
    """The windows that a run measures its loss on."""
    config = make_config(**{name: value for name, value in options.items() if name != "device"})
    vocabulary = len(tokenizer)
    return evaluation_texts(calibration_windows(str(text_file), tokenizer, config, vocabulary), tokenizer, vocabulary)


def check(report, dense, slim, texts):
    """The report's figures are those of whole models, as exact as fp32 is."""
    assert set(report["divergence"]) == {*texts, "dtype", "seconds"} > {BUNDLED, HELD_OUT}
    for name, text in texts.items():
        values = report["divergence"][name]
        with torch.no_grad():
            q, p = (model(text.windows).logits[:, :-1].double().flatten(0, 1) for model in (slim, dense))
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        labels = text.windows[:, 1:].flatten()[:, None]
        assert values["tokens"] == len(kl)
        assert values["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-4, abs=1e-6)
        assert values["kl"]["stderr"] == pytest.approx(float(kl.std()) / math.sqrt(len(kl)), rel=1e-3, abs=1e-6)
        assert values["kl"]["99%"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-3, abs=1e-6)
        assert values["same_top"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=2e-3)
        for side, log in (("before", log_p), ("after", log_q)):
            assert values["perplexity"][side] == pytest.approx(float((-log.gather(-1, labels)).mean().exp()), rel=1e-4)
        bits = values["kl"]["mean"] * text.tokens_per_byte / math.log(2)
        assert values["bits_per_byte"] == pytest.approx(bits)
        assert values["kl"]["mean"] > 1e-6  # or nothing was pruned


@pytest.fixture
def dense_folder(tmp_path, tokenizer):
    """A tiny model as a folder."""

    def make(family: str = "llama") -> Path:
        slimgpt.save(tiny_model(family), tokenizer, None, tmp_path / "dense")
        return tmp_path / "dense"

    return make


@pytest.mark.parametrize("family", [*CORE, "gpt2", "falcon", "qwen3_moe"])
def test_figures_are_those_of_whole_models(family, dense_folder, text_file, tmp_path):
    folder = dense_folder(family)
    report = slimgpt.prune_folder(str(folder), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    dense, loaded_tokenizer = load(str(folder))  # transformers has a tokenizer class of its own for some families
    texts = texts_of(loaded_tokenizer, text_file, OPTIONS)
    written = json.loads((tmp_path / "slim/slimgpt.json").read_text())
    assert json.loads(json.dumps(report.divergence)) == written["divergence"]
    check(written, dense, load(str(tmp_path / "slim"))[0], texts)


@pytest.mark.parametrize("in_memory", [True, False])
def test_figures_are_those_of_the_trained_model(in_memory, dense_folder, tokenizer, text_file, tmp_path):
    folder = dense_folder()
    if in_memory:
        slim, loaded = slimgpt.load(str(folder))
        report = slimgpt.prune(slim, loaded, calibration=str(text_file), **TRAINED)
    else:
        report = slimgpt.prune_folder(str(folder), tmp_path / "slim", calibration=str(text_file), **TRAINED)
        slim, _ = slimgpt.load(str(tmp_path / "slim"))
    assert report.distillation["kept"]
    check(report.to_json(), load(str(folder))[0], slim, texts_of(tokenizer, text_file, TRAINED))


def test_held_out_text_is_not_calibrated_on(tokenizer, text_file):
    config = make_config(num_samples=8, seq_len=24)
    text = calibration_windows(str(text_file), tokenizer, config, len(tokenizer))
    off = make_config(num_samples=8, seq_len=24, evaluate=False)
    without = calibration_windows(str(text_file), tokenizer, off, len(tokenizer))
    assert torch.equal(text.windows, without.windows)
    assert (len(text.held_out), len(without.held_out)) == (evaluation_tokens(8 * 24), 0)
    more = calibration_windows(str(text_file), tokenizer, make_config(num_samples=12, seq_len=24), len(tokenizer))
    assert torch.equal(text.held_out, more.windows[8:].flatten()[: len(text.held_out)])  # what comes next


@pytest.mark.parametrize(("calibration", "expected"), [(1000, 500), (16384, 1024), (65536, 2048), (262144, 4096)])
def test_tokens_are_a_small_share_of_the_calibration(calibration, expected):
    assert evaluation_tokens(calibration) == expected


def test_the_bundled_text_is_sixteen_kilobytes_of_several_kinds(starting):
    text = assets.general_text()
    assert 15_000 < len(text.encode()) < 20_000
    assert all(kind in text for kind in ("def ", "SELECT", "Customer:", '"You\'re late,"', "#include"))
    windows = torch.zeros(40, 24, dtype=torch.long)
    texts = evaluation_texts(CalibrationText(windows, "x", torch.arange(0)), starting, len(starting))
    assert list(texts) == [BUNDLED]
    assert set(texts[BUNDLED].windows[:, 0].tolist()) == {2}  # every window starts as every text does
    ids = starting(text, add_special_tokens=False)["input_ids"]
    assert texts[BUNDLED].windows[0, 1:].tolist() == ids[:23]
    assert texts[BUNDLED].windows[-1, 1:].tolist() == ids[-23:]


def test_without_text_or_tokenizer_nothing_is_measured(tokenizer):
    text = CalibrationText(torch.zeros(40, 24, dtype=torch.long), "tensor", torch.arange(0))
    assert evaluation_texts(text, None, 99) == {}
    assert evaluation_texts(text, tokenizer, 0) == {}  # ids outside the embedding
    assert evaluation_texts(text._replace(windows=torch.zeros(40, 1)), tokenizer, 99) == {}
    model = tiny_model("llama")
    report = slimgpt.prune(model, None, 0.3, torch.randint(0, 90, (8, 24)), device="cpu")
    assert report.divergence == {}


def test_off_by_a_setting(dense_folder, text_file, tmp_path):
    folder, outputs = str(dense_folder()), [tmp_path / "with", tmp_path / "without"]
    reports = [
        slimgpt.prune_folder(folder, output, calibration=str(text_file), evaluate=evaluate, **OPTIONS)
        for output, evaluate in zip(outputs, (True, False))
    ]
    assert (bool(reports[0].divergence), reports[1].divergence) == (True, {})
    weights = [{file.name: file.read_bytes() for file in output.glob("*.safetensors")} for output in outputs]
    assert weights[0] == weights[1]
    cards = [(output / "README.md").read_text() for output in outputs]
    assert ["How far from the base model" in card for card in cards] == [True, False]
    assert ["--no-evaluate" in card for card in cards] == [False, True]


def test_resumed_figures_are_the_same(dense_folder, text_file, tmp_path, monkeypatch):
    from slimgpt.pipeline import dense_comparison

    folder = str(dense_folder())
    whole = slimgpt.prune_folder(folder, tmp_path / "whole", calibration=str(text_file), **TRAINED)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # after the training, in the comparison itself
        patch.setattr(dense_comparison, "predicted_tokens", killed)
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            slimgpt.prune_folder(folder, tmp_path / "resumed", calibration=str(text_file), **TRAINED)
    report = slimgpt.prune_folder(folder, tmp_path / "resumed", calibration=str(text_file), resume=True, **TRAINED)
    for divergence in (whole.divergence, report.divergence):
        divergence.pop("seconds")
    assert report.divergence == whole.divergence


def test_nan_is_said_and_ends_no_run(dense_folder, text_file, tmp_path, monkeypatch):
    from slimgpt.pipeline import dense_comparison

    def damaged(*given):
        return real(*given)._replace(kl=torch.full((len(given[3]) * 23,), float("nan")))

    real = dense_comparison.predicted_tokens
    monkeypatch.setattr(dense_comparison, "predicted_tokens", damaged)
    report = slimgpt.prune_folder(str(dense_folder()), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    assert "kl" not in report.divergence[BUNDLED]
    assert "NaN or infinity" in (tmp_path / "slim/README.md").read_text()


def test_the_command_ends_with_it_and_what_to_run_next(dense_folder, text_file, tmp_path):
    given = ["prune", dense_folder(), tmp_path / "slim", "--ratio", 0.3, "--calibration", text_file]
    given += ["--num-samples", 8, "--seq-len", 24, "--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in given], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "slim/slimgpt.json").read_text())["divergence"]
    place = done.output.index("how far from the dense model")
    for name in (BUNDLED, HELD_OUT):
        assert f"{report[name]['kl']['mean']:.3f} ±" in done.output[place:]
        assert f"{report[name]['perplexity']['after']:.2f}" in done.output[place:]
    assert done.output.index("bundled", place) < done.output.index("held out", place)
    assert f"slimgpt evaluate {tmp_path / 'slim'} --against {tmp_path / 'dense'} --text" in done.output
