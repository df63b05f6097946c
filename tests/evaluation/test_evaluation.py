"""Perplexity against a plain loop in fp64; speed and memory of models that are really run."""

import math

import pytest
import torch

from slimgpt.errors import ModelError, UsageError
from slimgpt.evaluation import measure_speed, peak_memory, perplexity
from slimgpt.models.source import locate
from tests.models.families import tiny_model


@pytest.fixture(scope="module")
def text(text_file):
    return text_file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def test_perplexity_is_the_mean_over_predicted_tokens(model, tokenizer, text):
    measured = perplexity(model, tokenizer, text, window=20, max_tokens=210)
    ids = torch.tensor(tokenizer(text)["input_ids"][:210])
    exact, total, predicted = tiny_model("llama").double(), 0.0, 0
    for start in range(0, 200, 20):
        window = ids[start : start + 20]
        with torch.no_grad():
            logits = exact(window.unsqueeze(0)).logits[0].log_softmax(-1)
        for position in range(19):
            total -= float(logits[position, window[position + 1]])
            predicted += 1
    assert measured.perplexity == pytest.approx(math.exp(total / predicted), rel=1e-5)
    assert (measured.tokens, measured.predicted, measured.window) == (200, 190, 20)
    assert {"text_sha256", "stride", "dtype", "tokenizer"} <= set(measured.to_json()["protocol"])


def test_batches_do_not_change_it(model, tokenizer, text):
    values = [perplexity(model, tokenizer, text, 16, 320, batch_size=size).perplexity for size in (1, 3, 20)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


def test_progress_reaches_the_end(model, tokenizer, text):
    steps = []
    perplexity(model, tokenizer, text, 16, 320, batch_size=8, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize(
    ("window", "max_tokens", "message"),
    [(1, None, "too small"), (65, None, "longer than the model's context"), (32, 31, "fewer than one window")],
)
def test_windows_that_do_not_fit(window, max_tokens, message, model, tokenizer, text):
    with pytest.raises(UsageError, match=message):
        perplexity(model, tokenizer, text, window, max_tokens)


def test_speed_of_two_models(model):
    narrow = tiny_model("llama", num_hidden_layers=1)
    wide, thin = measure_speed([model, narrow], prompt=16, new_tokens=4, rounds=3)
    assert thin.decode > wide.decode > 0
    assert wide.prefill > 0


def test_peak_memory_is_that_of_a_fresh_process(dense_folder, tmp_path):
    ballast = torch.ones(300_000_000)  # 1.2 GB here must not count there
    peak = peak_memory(locate(str(dense_folder)))
    del ballast
    assert 50e6 < peak < 1.2e9
    with pytest.raises(ModelError, match=r"no config.json"):
        peak_memory(locate(str(tmp_path)))
