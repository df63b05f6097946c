"""The Hessian: batches, shards and damping against the matrix of all tokens at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimgpt.solver import Gram, damp


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_batches_give_the_hessian_of_one_batch(sizes, seed):
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = Gram(5, dtype=torch.float64)
    for batch in x.split(sizes):
        gram.add(batch)
    torch.testing.assert_close(gram.mean(), x.T @ x / len(x), rtol=1e-12, atol=1e-12)


def test_three_dimensional_batches_are_rows():
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    gram = Gram(6, dtype=torch.float64)
    gram.add(x)
    assert gram.count == 12
    rows = x.view(12, 6)
    torch.testing.assert_close(gram.mean(), rows.T @ rows / 12, rtol=1e-12, atol=1e-12)


def test_half_precision_inputs_are_summed_in_fp32():
    x = torch.randn(2048, 4).to(torch.bfloat16)
    gram = Gram(4)
    gram.add(x)
    exact = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(gram.mean().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_above_the_diagonal_make_the_whole_matrix(dtype):
    """Sizes that are no multiple of the block; compared with fp64 on the same numbers."""
    x = torch.randn(300, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = Gram(11, block=4)
    for batch in x.split(70):
        gram.add(batch)
    H = gram.mean()
    assert torch.equal(H, H.T)
    torch.testing.assert_close(H.double(), x.double().T @ x.double() / len(x), rtol=1e-5, atol=1e-6)


def test_no_tokens():
    with pytest.raises(ValueError, match="no tokens"):
        Gram(3).mean()


def test_damping_adds_a_share_of_the_mean_diagonal():
    H = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    before = H.clone()
    torch.testing.assert_close(damp(H, 0.1), before + 0.1 * 3.0 * torch.eye(2, dtype=torch.float64))


def test_dead_features_get_a_unit_diagonal():
    x = torch.randn(50, 4, dtype=torch.float64)
    x[:, 2] = 0
    H = damp(x.T @ x / 50, 0.0)
    assert H[2, 2] == 1
    assert H[2, [0, 1, 3]].abs().max() == 0
    torch.linalg.cholesky(H)
