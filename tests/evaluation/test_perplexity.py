"""Perplexity against twenty lines of our own, at both windows of the literature."""

from __future__ import annotations

import math

import pytest
import torch

import slimgpt
from slimgpt.errors import UsageError
from slimgpt.evaluation import perplexity
from tests.models.families import tiny_model


def plain(model, ids, window, stride=None):
    """Window by window, token by token: what is predicted for the first time counts."""
    total, predicted, seen, stride = 0.0, 0, 1, stride or window
    for start in range(0, len(ids) - window + 1, stride):
        piece = ids[start : start + window]
        with torch.no_grad():
            values = model(piece[None]).logits[0].double().log_softmax(-1)
        for position in range(1, window):
            if start + position >= seen:
                total -= float(values[position - 1, piece[position]])
                predicted += 1
        seen = start + window
    return math.exp(total / predicted), predicted


@pytest.mark.network
@pytest.mark.slow  # tiny models hold the same in the default level
@pytest.mark.parametrize(("window", "tokens"), [(128, 1024), (2048, 2048)])
def test_smollm2_at_the_windows_of_the_literature(window, tokens, smollm2):
    model, tokenizer = smollm2
    text = slimgpt.evaluation.read_text("demo").content
    expected, predicted = plain(model, torch.tensor(tokenizer(text)["input_ids"][:tokens]), window)
    for batch_size in (1, 8):
        measured = perplexity(model, tokenizer, text, window, tokens, batch_size)
        assert measured.perplexity == pytest.approx(expected, rel=1e-6)
        assert measured.predicted == predicted


@pytest.mark.parametrize("stride", [1, 7, 19, None])
def test_bos_in_every_window(stride, starting, text_file):
    model, text, step = tiny_model("llama"), text_file.read_text(), stride or 19
    ids = starting(text)["input_ids"][:200]
    measured = perplexity(model, starting, text, 20, 200, batch_size=3, stride=stride, bos="window")
    total, seen = [], 1
    for start in range(1, len(ids) - 18, step):
        piece = torch.tensor([2, *ids[start : start + 19]])
        with torch.no_grad():
            values = model(piece[None]).logits[0].double().log_softmax(-1)
        total += [-float(values[p - 1, piece[p]]) for p in range(1, 20) if start + p - 1 >= seen]
        seen = start + 19
    assert measured.perplexity == pytest.approx(math.exp(sum(total) / len(total)), rel=1e-6)
    assert (measured.predicted, measured.tokens) == (len(total), len(total))
    assert measured.protocol["special_tokens"].endswith("every window")
    assert measured.perplexity != perplexity(model, starting, text, 20, 200, stride=stride).perplexity


def test_gemma_gets_bos_in_every_window(starting, text_file):
    model, text = tiny_model("gemma2"), text_file.read_text()
    perplexities = [
        perplexity(model, starting, text, 20, 200, bos=bos).perplexity for bos in ("auto", "window", "once")
    ]
    assert perplexities[0] == perplexities[1] != perplexities[2]
    with pytest.raises(UsageError, match="auto, once, window"):
        perplexity(model, starting, text, 20, bos="twice")


@pytest.mark.parametrize("stride", [1, 7, 19, 20, None])
def test_strides(stride, tokenizer, text_file):
    model, text = tiny_model("llama"), text_file.read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"][:200])
    measured = perplexity(model, tokenizer, text, 20, 200, batch_size=3, stride=stride)
    expected, predicted = plain(model, ids, 20, stride)
    assert (measured.perplexity, measured.predicted) == (pytest.approx(expected, rel=1e-6), predicted)
    assert measured.protocol["stride"] == (stride or 20)


def test_stride_must_fit_the_window(tokenizer, text_file):
    for stride in (0, 21):
        with pytest.raises(UsageError, match="must lie between 1 and the window"):
            perplexity(tiny_model("llama"), tokenizer, text_file.read_text(), 20, stride=stride)


def test_per_word_and_per_byte(tokenizer, text_file):
    text = text_file.read_text()
    measured = perplexity(tiny_model("llama"), tokenizer, text, 20)
    per_text = math.log(measured.perplexity) * len(tokenizer(text)["input_ids"])
    assert math.log(measured.word_perplexity) == pytest.approx(per_text / len(text.split()))
    assert math.log(measured.byte_perplexity) == pytest.approx(per_text / len(text.encode()))


def test_positions_are_means_over_the_windows(tokenizer, text_file):
    model, text = tiny_model("llama"), text_file.read_text()
    measured = perplexity(model, tokenizer, text, 20, 200, by_position=True)
    windows = torch.tensor(tokenizer(text)["input_ids"][:200]).view(10, 20)
    with torch.no_grad():
        values = model(windows).logits.log_softmax(-1)
    losses = -values[:, :-1].gather(-1, windows[:, 1:, None])[..., 0].mean(0)
    assert list(measured.by_position) == [1, 2, 4, 8, 16]
    assert measured.by_position[1] == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert measured.by_position[4] == pytest.approx(math.exp(losses[3:7].mean()), rel=1e-5)
    assert measured.by_position[16] == pytest.approx(math.exp(losses[15:].mean()), rel=1e-5)


@pytest.mark.parametrize(("max_tokens", "most"), [(100, None), (None, 20)])
def test_a_seed_draws_where_windows_begin(max_tokens, most, tokenizer, text_file):
    model, text = tiny_model("llama").eval(), text_file.read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    starts = set()
    for seed in range(12):
        measured = perplexity(model, tokenizer, text, 20, max_tokens, seed=seed)
        start = measured.protocol["skipped_tokens"]
        end = len(ids) if max_tokens is None else start + max_tokens
        assert 0 <= start < (len(ids) - 100 + 1 if most is None else most)
        expected, predicted = plain(model, ids[start:end], 20)
        assert (measured.perplexity, measured.predicted) == (pytest.approx(expected, rel=1e-6), predicted)
        assert measured.protocol["seed"] == seed
        starts.add(start)
    assert len(starts) > 5
    first = perplexity(model, tokenizer, text, 20, max_tokens)
    assert (first.protocol["seed"], first.protocol["skipped_tokens"]) == (None, 0)


def test_windows_that_a_seed_moves_keep_the_text_s_bos(starting, text_file):
    model, text = tiny_model("llama").eval(), text_file.read_text()
    ids = starting(text)["input_ids"]
    measured = perplexity(model, starting, text, 20, 100, seed=3)
    start = measured.protocol["skipped_tokens"]
    assert start > 0
    expected, _ = plain(model, torch.tensor([ids[0], *ids[1 + start : 100 + start]]), 20)
    assert measured.perplexity == pytest.approx(expected, rel=1e-6)


def test_the_error_of_the_logarithm_is_that_of_the_tokens(tokenizer, text_file):
    model, text = tiny_model("llama").eval(), text_file.read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"][:200])
    losses = []
    for start in range(0, 200, 20):
        with torch.no_grad():
            values = model(ids[None, start : start + 20]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-values.gather(1, ids[start + 1 : start + 20, None])[:, 0])
    every = torch.cat(losses)
    measured = perplexity(model, tokenizer, text, 20, 200)
    assert measured.log_stderr == pytest.approx(float(every.std() / len(every) ** 0.5), rel=1e-6)
