"""Losses of logits in pieces, against the whole ones in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from slimgpt.losses.distillation import text_loss
from slimgpt.losses.linear import linear_loss


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("most", [1, 5 * 11, 10**6])
def test_pieces_give_the_loss_and_the_gradients_of_whole_logits(most, with_bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((13, 6), (11, 6), (11,))
    )
    tokens = torch.randint(11, (13,), generator=generator)
    tensors = [hidden, weight, *([bias] if with_bias else [])]
    results = []
    for pieces in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        head = (leaves[0], leaves[1], leaves[2] if with_bias else None)
        if pieces:
            loss = linear_loss(*head, lambda logits, place: text_loss(logits, tokens[place]), most)
        else:
            loss = F.cross_entropy(F.linear(*head), tokens, reduction="sum")
        (3 * loss).backward()
        results.append([loss.double(), *(leaf.grad for leaf in leaves)])
    for own, expected in zip(*results, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_no_token_no_loss():
    weight, hidden = torch.randn(11, 6), torch.randn(4, 6, requires_grad=True)
    tokens = torch.zeros(4, dtype=torch.long)
    linear_loss(hidden, weight, None, lambda logits, place: text_loss(logits, tokens[place]), 22).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    nothing = linear_loss(hidden[:0], weight, None, lambda logits, place: text_loss(logits, tokens[place]))
    assert float(nothing) == 0
    nothing.backward()


def test_no_piece_has_more_logits_than_allowed():
    weight, hidden, sizes = torch.randn(10, 6), torch.randn(7, 6), []

    def loss(logits, place):
        sizes.append((logits.numel(), place))
        return logits.sum()

    linear_loss(hidden, weight, None, loss, most=35)
    assert sizes == [(30, slice(0, 3)), (30, slice(3, 6)), (10, slice(6, 7))]


def test_without_gradients_no_gradient_is_computed():
    weight, grad = torch.randn(10, 6, requires_grad=True), []

    def loss(logits, _):
        grad.append(logits.requires_grad)
        return logits.sum()

    with torch.no_grad():
        linear_loss(torch.randn(7, 6), weight, None, loss, most=35)
    assert grad == [False] * 3


def test_gradients_of_a_head_in_16_bits_are_rounded_once():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.rand(shape, generator=generator).bfloat16() for shape in ((512, 4), (8, 4)))
    leaves = [weight.clone().requires_grad_() for _ in range(2)]
    for leaf, most in zip(leaves, (8, 10**6)):
        linear_loss(hidden, leaf, None, lambda logits, _: logits.float().sum(), most).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=2**-7, atol=0)
