"""Log-probabilities and divergences against torch's own, which make whole tables of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from slimgpt.losses.chunked import distillation_loss, log_probabilities

TYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
PIECES = pytest.mark.parametrize("cached", [1, 30, 10**6])  # one row at once, two rows, all


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@TYPES
@PIECES
def test_log_probabilities_and_their_gradient_are_those_of_log_softmax(dtype, tolerance, cached):
    logits = numbers(0, 7, 11).to(dtype).requires_grad_()
    ids = torch.randint(0, 11, (7, 4), generator=torch.Generator().manual_seed(1))
    ids[:, 1] = ids[:, 0]  # the same token twice
    log_p = log_probabilities(logits, ids, cached)
    wide = torch.promote_types(dtype, torch.float32)
    expected = logits.to(wide).log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(log_p, expected, rtol=1e-5, atol=1e-5)
    slope = numbers(2, 7, 4).to(wide)
    gradients = [torch.autograd.grad((slope * value).sum(), logits)[0] for value in (log_p, expected)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_no_tokens_have_no_log_probabilities():
    assert log_probabilities(torch.zeros(0, 11), torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2)


@TYPES
@PIECES
def test_divergence_and_its_gradient_are_those_of_kl_div(dtype, tolerance, cached):
    teacher, student = numbers(0, 7, 11).to(dtype), numbers(1, 7, 11).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.kl_div(
        student.to(wide).log_softmax(-1), teacher.to(wide).log_softmax(-1), log_target=True, reduction="sum"
    )
    total, cross_entropy, gradient = distillation_loss(teacher, student.detach(), chunk=cached)
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert cross_entropy == 0
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0], rtol=tolerance, atol=tolerance)
    assert distillation_loss(teacher, student.detach(), with_gradient=False, chunk=cached) == (total, 0, None)


@TYPES
@PIECES
def test_gradient_with_the_text_is_that_of_both_losses(dtype, tolerance, cached):
    teacher, student = numbers(0, 7, 11).to(dtype), numbers(1, 7, 11).to(dtype).requires_grad_()
    labels = torch.tensor([3, 0, -100, 10, 3, -100, 7])  # at two places there is no label
    log_q = student.to(torch.promote_types(dtype, torch.float32)).log_softmax(-1)
    log_p = teacher.to(log_q).log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    text = F.nll_loss(log_q, labels, ignore_index=-100, reduction="sum")
    both = expected + 0.5 * text
    total, cross_entropy, gradient = distillation_loss(teacher, student.detach(), labels, 0.5, chunk=cached)
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    assert cross_entropy == pytest.approx(float(text.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(both, student)[0], rtol=tolerance, atol=tolerance)
