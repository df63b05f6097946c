"""Divergence from the dense model against thirty lines of our own, and against closed forms."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import NumericalError, UsageError
from slimgpt.evaluation import Perplexity, perplexity
from slimgpt.evaluation import divergence as module
from slimgpt.losses.chunked import token_divergence
from tests.models.families import tiny_model


def plain(model, base, ids, window, stride=None):
    """Token by token, in fp64 over whole tables of logits: KL, same top, and both models' ln p of the text's token."""
    rows, seen, stride = [], 1, stride or window
    for start in range(0, len(ids) - window + 1, stride):
        piece = ids[start : start + window]
        with torch.no_grad():
            q, p = (one(piece[None]).logits[0].double() for one in (model, base))
        log_q, log_p = q.log_softmax(-1), p.log_softmax(-1)
        for at in range(1, window):
            if start + at >= seen:
                kl = sum(math.exp(a) * (a - b) for a, b in zip(log_p[at - 1].tolist(), log_q[at - 1].tolist()))
                same = int(p[at - 1].argmax()) == int(q[at - 1].argmax())
                token = int(piece[at])
                rows.append((at, kl, same, float(log_p[at - 1, token]), float(log_q[at - 1, token])))
        seen = start + window
    return rows


def quantile(values, share):
    """With linear interpolation, as llama.cpp has it."""
    values = sorted(values)
    place = share * (len(values) - 1)
    low = int(place)
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


@pytest.fixture(scope="module")
def pair():
    """Two models of the same vocabulary."""
    base, model = tiny_model("llama"), tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return model, base


def agrees(measured: Perplexity, rows, tokens_per_byte):
    """Every figure is the plain computation's, to a millionth."""
    count, divergence = len(rows), measured.divergence
    _, kls, same, base_log_p, log_p = (list(column) for column in zip(*rows))
    close = {"rel": 1e-6, "abs": 1e-9}
    mean = sum(kls) / count
    assert divergence.kl.mean == pytest.approx(mean, **close)
    error = math.sqrt(sum((kl - mean) ** 2 for kl in kls) / count / (count - 1))
    assert divergence.kl.stderr == pytest.approx(error, **close)
    assert divergence.kl.median == pytest.approx(quantile(kls, 0.5), **close)
    for percent in (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9):
        assert divergence.kl.quantiles[f"{percent}%"] == pytest.approx(quantile(kls, percent / 100), **close)
    assert (divergence.kl.minimum, divergence.kl.maximum) == (
        pytest.approx(min(kls), **close),
        pytest.approx(max(kls), **close),
    )
    assert divergence.bits_per_byte == pytest.approx(mean * tokens_per_byte / math.log(2), **close)
    assert divergence.same_top == pytest.approx(sum(same) / count)
    deltas = [math.exp(q) - math.exp(p) for p, q in zip(base_log_p, log_p)]
    assert divergence.delta_p.mean == pytest.approx(sum(deltas) / count, **close)
    assert divergence.delta_p.rms == pytest.approx(math.sqrt(sum(d * d for d in deltas) / count), **close)
    assert divergence.base_perplexity == pytest.approx(math.exp(-sum(base_log_p) / count), **close)
    assert measured.perplexity == pytest.approx(math.exp(-sum(log_p) / count), **close)
    assert divergence.log_perplexity_ratio == pytest.approx(
        math.log(measured.perplexity / divergence.base_perplexity), **close
    )
    for first, part in divergence.by_position.items():
        inside = [row for row in rows if first <= row[0] < 2 * first]
        assert part.tokens == len(inside)
        assert part.kl == pytest.approx(sum(row[1] for row in inside) / len(inside), **close)
        assert part.same_top == pytest.approx(sum(row[2] for row in inside) / len(inside))
    assert sum(part.tokens for part in divergence.by_position.values()) == count == measured.predicted


@pytest.mark.parametrize("stride", [None, 7])
def test_divergence_is_that_of_a_plain_computation(stride, pair, tokenizer, text_file):
    model, base = pair
    text = text_file.read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    measured = slimgpt.evaluate(
        model, tokenizer, str(text_file), window=20, stride=stride, max_tokens=200, against=base
    )
    agrees(measured, plain(model, base, ids[:200], 20, stride), len(ids) / len(text.encode()))
    alone = slimgpt.evaluate(model, tokenizer, str(text_file), window=20, stride=stride, max_tokens=200)
    assert alone.divergence is None
    assert alone.perplexity == pytest.approx(measured.perplexity, rel=1e-12)


@pytest.mark.network
@pytest.mark.slow  # tiny models hold the same in the default level
def test_divergence_of_smollm2_is_that_of_a_plain_computation(smollm2):
    base, tokenizer = smollm2
    model, _ = slimgpt.load("demo", "bfloat16")
    text = slimgpt.evaluation.read_text("demo").content
    measured = perplexity(model, tokenizer, text, 64, 192, against=base)
    ids = tokenizer(text)["input_ids"]
    agrees(measured, plain(model, base, torch.tensor(ids[:192]), 64), len(ids) / len(text.encode()))


def test_a_model_does_not_diverge_from_itself(pair, tokenizer, text_file):
    base = pair[1].train()  # with or without dropout: it is measured without
    divergence = perplexity(base, tokenizer, text_file.read_text(), 20, 200, against=base).divergence
    assert base.training
    base.eval()
    assert (divergence.kl.mean, divergence.kl.maximum, divergence.delta_p.rms, divergence.bits_per_byte) == (0, 0, 0, 0)
    assert (divergence.same_top, divergence.same_top_stderr) == (1, 0)
    assert divergence.correlation == pytest.approx(1, abs=1e-12)


def test_token_divergence_has_the_closed_form_of_two_coins():
    p, q = torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.2])
    logits = [torch.stack([share.log(), (1 - share).log()], -1) for share in (p, q)]
    divergences = token_divergence(*logits, torch.tensor([0, 1]))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(divergences.kl, expected.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(divergences.teacher_log_p.exp(), torch.tensor([0.9, 0.5]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(divergences.student_log_p.exp(), torch.tensor([0.6, 0.8]).double(), rtol=1e-6, atol=0)
    assert divergences.same_top.tolist() == [True, False]  # of two equally likely tokens the first counts


def test_logits_are_there_for_one_batch_at_a_time(monkeypatch, pair, tokenizer, text_file):
    rows = []
    monkeypatch.setattr(
        module,
        "token_divergence",
        lambda teacher, student, labels: rows.append(len(labels)) or token_divergence(teacher, student, labels),
    )
    perplexity(pair[0], tokenizer, text_file.read_text(), 20, 200, batch_size=3, against=pair[1])
    assert rows == [57, 57, 57, 19]


def test_other_vocabularies_and_tokenizers_are_refused(pair, tokenizer, starting, text_file, tmp_path):
    other = tiny_model("llama", vocab_size=pair[0].config.vocab_size + 8)
    text = text_file.read_text()
    with pytest.raises(UsageError, match="the same vocabulary"):
        perplexity(pair[0], tokenizer, text, 20, 200, against=other)
    slimgpt.save(pair[1], starting, None, tmp_path / "base")
    with pytest.raises(UsageError, match="tokenizers make"):
        slimgpt.evaluate(pair[0], tokenizer, str(text_file), window=20, against=str(tmp_path / "base"))


def test_a_damaged_base_is_named(pair, tokenizer, text_file):
    base = tiny_model("llama")
    base.config.name_or_path = "dense"
    with torch.no_grad():
        base.lm_head.weight[0].fill_(float("nan"))
    with pytest.raises(NumericalError, match="the divergence from dense"):
        perplexity(pair[0], tokenizer, text_file.read_text(), 20, 200, against=base)


def test_json_goes_both_ways(pair, tokenizer, text_file):
    measured = perplexity(pair[0], tokenizer, text_file.read_text(), 20, 200, against=pair[1])
    assert Perplexity.from_json(json.loads(json.dumps(measured.to_json()))) == measured


def test_the_command(pair, tokenizer, text_file, tmp_path):
    for name, model in zip(("slim", "dense"), pair):
        slimgpt.save(model, tokenizer, None, tmp_path / name)
    given = ["evaluate", tmp_path / "slim", "--against", tmp_path / "dense", "--window", 20, "--max-tokens", 200]
    given += ["--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in (*given, "--text", text_file, "--json", tmp_path / "o.json")])
    assert done.exit_code == 0, done.output
    expected = perplexity(pair[0], tokenizer, text_file.read_text(), 20, 200, against=pair[1]).divergence
    written = json.loads((tmp_path / "o.json").read_text())["divergence"]
    assert written["kl"]["mean"] == pytest.approx(expected.kl.mean, rel=1e-5)
    for shown in (
        f"{expected.kl.mean:.4f}",
        f"{expected.same_top:.2%}",
        "99.9%",
        "median",
        f"{expected.bits_per_byte:.4f}",
    ):
        assert shown in done.output
    done = CliRunner().invoke(app, [str(word) for word in (*given, "--tasks", "boolq")])
    assert (done.exit_code, "give --text" in done.output) == (2, True)
