"""Losses against torch's own, and against what must hold of a divergence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from slimgpt.losses.distillation import divergence, layer_distance, predicted, text_loss, text_loss_and_divergence
from tests.models.families import tiny_model, windows


def pair(seed, tokens=5, vocabulary=11, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))


def top(teacher, k):
    log_p, ids = teacher.log_softmax(-1).topk(k, -1)
    return ids, log_p


def test_text_loss_is_what_the_model_class_computes():
    model, ids = tiny_model("llama"), windows(3, 16)
    labels = ids.clone()
    labels[0, :9] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).loss
        logits, tokens = predicted(model(input_ids=ids).logits, labels)
    assert len(tokens) == 7 + 15 + 15
    torch.testing.assert_close(text_loss(logits, tokens) / len(tokens), expected)


@given(seed=st.integers(0, 10_000))
def test_divergence_with_the_whole_vocabulary_is_kullback_leibler(seed):
    student, teacher = pair(seed)
    expected = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum")
    torch.testing.assert_close(divergence(student, *top(teacher, 11)), expected, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 10))
def test_divergence_of_the_top_tokens_is_between_zero_and_the_exact_one(seed, k):
    student, teacher = pair(seed, scale=1.0)
    exact = divergence(student, *top(teacher, 11))
    assert -1e-4 <= float(divergence(student, *top(teacher, k))) <= float(exact) + 1e-3
    assert float(divergence(teacher, *top(teacher, k))) == pytest.approx(0, abs=1e-4)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 11))
def test_both_losses_at_once_are_the_two_with_their_gradients(seed, k):
    student, teacher = pair(seed)
    student, tokens, predictions = student.requires_grad_(), student.detach().argmin(-1), top(teacher, k)
    both = text_loss_and_divergence(student, tokens, *predictions)
    for loss_of_both, alone in zip(both, (text_loss(student, tokens), divergence(student, *predictions))):
        torch.testing.assert_close(loss_of_both, alone)
        slopes = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (loss_of_both, alone)]
        torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


def test_divergence_moves_the_student_to_the_teacher():
    student, teacher = pair(0)
    student = student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        divergence(student, *top(teacher, 4)).backward()
        optimizer.step()
    ids, log_p = top(teacher, 4)
    torch.testing.assert_close(student.detach().log_softmax(-1).gather(-1, ids), log_p, atol=0.02, rtol=0)


def test_layer_distance_is_relative_and_zero_for_equals():
    teacher = torch.randn(6, 2, 8)
    assert layer_distance(teacher, teacher) == 0
    assert float(layer_distance(1.5 * teacher, teacher)) == pytest.approx(6 * 0.25)
