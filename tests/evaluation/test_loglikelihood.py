"""Log-likelihoods against one forward pass per request, without padding, caches or batches."""

from __future__ import annotations

import pytest
import torch

from slimgpt.evaluation import loglikelihood as likelihood
from slimgpt.evaluation.loglikelihood import log_likelihoods
from tests.models.families import OWN, VOCABULARY, tiny_model


def one_by_one(model, requests, max_length):
    scores = []
    for context, continuation in requests:
        ids = torch.tensor([[*context, *continuation][-(max_length + 1) :]])
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(continuation) :]
        targets = torch.tensor(continuation)
        values = logits.log_softmax(-1)[range(len(continuation)), targets]
        scores.append((float(values.sum()), bool(logits.argmax(-1).eq(targets).all())))
    return scores


def requests_of_all_shapes(seed=3):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    requests = []
    for _ in range(7):
        context = torch.randint(VOCABULARY, (number(1, 30),), generator=generator).tolist()
        for _ in range(number(1, 5)):
            requests.append((context, torch.randint(VOCABULARY, (number(1, 9),), generator=generator).tolist()))
    return requests


@pytest.mark.parametrize("family", sorted(OWN))
def test_every_family_equals_one_request_at_a_time(family):
    model, requests = tiny_model(family), requests_of_all_shapes()
    for batched, expected in zip(log_likelihoods(model, requests, 64), one_by_one(model, requests, 64)):
        assert batched[0] == pytest.approx(expected[0], abs=1e-4)
        assert batched[1] == expected[1]


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_batches_do_not_matter(tokens, monkeypatch):
    monkeypatch.setattr(likelihood, "batch_tokens", lambda _: tokens)
    model, requests = tiny_model("llama"), requests_of_all_shapes()
    answered = []
    batched = log_likelihoods(model, requests, 64, answered.append)
    assert [v for v, _ in batched] == pytest.approx([v for v, _ in one_by_one(model, requests, 64)], abs=1e-4)
    assert sum(answered) == len(requests)
    assert (len(answered) == 1) == (tokens == 10_000)


def test_long_contexts_lose_their_beginning():
    model, requests = tiny_model("llama"), requests_of_all_shapes()
    batched = log_likelihoods(model, requests, 12)
    assert [v for v, _ in batched] == pytest.approx([v for v, _ in one_by_one(model, requests, 12)], abs=1e-4)


def test_greedy_continuations_are_recognised():
    model = tiny_model("llama")
    ids = torch.tensor([[5, 7, 11]])
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    other = [*greedy[:3], (greedy[3] + 1) % VOCABULARY]
    assert [same for _, same in log_likelihoods(model, [([5, 7, 11], greedy), ([5, 7, 11], other)], 64)] == [
        True,
        False,
    ]
