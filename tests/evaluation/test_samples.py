"""Texts that a model writes, against a loop of our own."""

from __future__ import annotations

import copy

import pytest
import torch

from slimgpt.evaluation.samples import OPENINGS, QUESTIONS, write_samples
from tests.models.families import sharpened_model, tiny_model

TEMPLATE = "{% for m in messages %}Q {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}A{% endif %}"


def greedy(model, ids, count, ends):
    """The most likely token, again and again, without a cache."""
    written = []
    while len(written) < count and (not written or written[-1] not in ends):
        with torch.no_grad():
            written.append(int(model(torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


@pytest.fixture(scope="module")
def model():
    return sharpened_model(4, max_position_embeddings=256)


@pytest.mark.parametrize("templated", [False, True])
def test_samples_are_the_most_likely_tokens(templated, model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE if templated else None
    prompts = QUESTIONS if templated else OPENINGS
    forwards, done = [], []
    hook = model.register_forward_hook(lambda _module, _inputs, output: forwards.append(len(output.logits)))
    samples = write_samples(model.train(), tokenizer, 2, 12, done.append)
    hook.remove()
    assert model.training
    assert set(forwards) == {2}  # both in one batch
    assert len(forwards) <= 12
    assert sum(done) == 2
    assert [sample.prompt for sample in samples] == list(prompts[:2])
    model.eval()
    for sample in samples:
        ids = tokenizer(f"Q {sample.prompt} A" if templated else sample.prompt)["input_ids"]
        expected = greedy(model, ids, 12, {tokenizer.eos_token_id})
        assert sample.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert sample.stopped == (expected[-1] == tokenizer.eos_token_id)
    assert len({sample.text for sample in samples}) == 2


def test_a_model_that_ends_its_answer(model, tokenizer):
    ids = tokenizer(OPENINGS[0])["input_ids"]
    written = greedy(model, ids, 12, set())
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [written[3]]
    (sample,) = write_samples(model, tokenizer, 1, 12)
    expected = written[: written.index(written[3]) + 1]
    assert (sample.stopped, sample.text) == (True, tokenizer.decode(expected, skip_special_tokens=True))


def test_answers_end_where_the_context_does(tokenizer):
    length = len(tokenizer(OPENINGS[0])["input_ids"])
    for room in (0, 2):
        model = tiny_model("llama", max_position_embeddings=length + room)
        (sample,) = write_samples(model, tokenizer, 1, 12)
        assert sample.stopped is False
        if room:
            written = greedy(model.eval(), tokenizer(OPENINGS[0])["input_ids"], room, {tokenizer.eos_token_id})
            assert sample.text == tokenizer.decode(written, skip_special_tokens=True)
        else:
            assert sample.text is None


def test_a_prompt_without_room_stands_between_others(model, tokenizer):
    lengths = [len(tokenizer(opening)["input_ids"]) for opening in OPENINGS[:3]]
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = max(lengths)
    whole, done = write_samples(model, tokenizer, 3, 12), []
    samples = write_samples(short, tokenizer, 3, 12, done.append)
    assert sum(done) == 3
    for sample, expected, length in zip(samples, whole, lengths):
        room = min(12, max(lengths) - length)
        assert (sample.text is None) == (room == 0)
        if room:
            written = greedy(model.eval(), tokenizer(sample.prompt)["input_ids"], room, {tokenizer.eos_token_id})
            assert sample.text == tokenizer.decode(written, skip_special_tokens=True)
            assert expected.text is not None
            assert expected.text.startswith(sample.text)
    assert any(sample.text is None for sample in samples)
    assert any(sample.text is not None for sample in samples)


def test_a_template_for_something_else_is_left_out(model, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('tools only') }}"
    assert [sample.prompt for sample in write_samples(model, tokenizer, 1, 2)] == [OPENINGS[0]]
