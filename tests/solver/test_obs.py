"""Batched Greedy Pruning against closed forms and against brute force, in fp64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgpt.solver import group_sizes, reconstruct, relative_error, select_channels, select_heads
from slimgpt.solver.obs import Elimination, head_scores, inverse


def problem(n: int, out: int = 7, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mix
    W = torch.randn(out, n, generator=generator, dtype=torch.float64)
    return W, x.T @ x / tokens


def loss(W: torch.Tensor, H: torch.Tensor, kept: torch.Tensor) -> float:
    """``E||Wx - W'x_K||^2`` at the best ``W'``, from the definition."""
    W_kept = (W @ H)[:, kept] @ torch.linalg.inv(H[kept][:, kept])
    D = W.clone()
    D[:, kept] -= W_kept
    return float(torch.trace(D @ H @ D.T))


def others(n: int, columns: torch.Tensor) -> torch.Tensor:
    return torch.tensor([i for i in range(n) if i not in set(columns.tolist())])


def test_exact_head_score_is_the_loss_of_removing_that_head_for_every_head():
    heads, d = 6, 4
    W, H = problem(heads * d)
    H_inv = inverse(H)
    blocks = torch.stack([H_inv[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(heads)])
    scores = head_scores(W.T.reshape(heads, d, -1), blocks, "exact")
    for head in range(heads):
        kept = others(heads * d, torch.arange(head * d, (head + 1) * d))
        assert float(scores[head]) == pytest.approx(loss(W, H, kept), rel=1e-9)


def test_grouped_cholesky_score_is_the_papers_formula():
    heads, d = 5, 3
    W, H = problem(heads * d, seed=1)
    H_inv = inverse(H)
    blocks = torch.stack([H_inv[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(heads)])
    scores = head_scores(W.T.reshape(heads, d, -1), blocks, "grouped_cholesky")
    for head in range(heads):
        L = torch.linalg.cholesky(blocks[head])
        expected = sum(
            float(W[row, head * d + j]) ** 2 / float(L[j, j]) ** 2 for row in range(W.shape[0]) for j in range(d)
        )
        assert float(scores[head]) == pytest.approx(expected, rel=1e-12)


def test_diagonal_score_is_the_ablation():
    heads, d = 3, 2
    W, H = problem(heads * d, seed=2)
    diagonal = inverse(H).diagonal()
    blocks = torch.stack([inverse(H)[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(heads)])
    scores = head_scores(W.T.reshape(heads, d, -1), blocks, "diagonal")
    expected = (W.square().sum(0) / diagonal).view(heads, d).sum(1)
    torch.testing.assert_close(scores, expected)


def test_one_head_removed_is_the_best_of_all_choices():
    for seed in range(5):
        heads, d = 6, 3
        W, H = problem(heads * d, seed=seed)
        best = min(range(heads), key=lambda h: loss(W, H, others(heads * d, torch.arange(h * d, (h + 1) * d))))
        kept = select_heads(W, H, heads, heads - 1)
        assert set(range(heads)) - set(kept.tolist()) == {best}


def test_greedy_removal_follows_brute_force_at_every_step():
    heads, d = 6, 2
    W, H = problem(heads * d, seed=3)
    live = list(range(heads))
    while len(live) > 2:
        costs = {}
        for head in live:
            rest = [h for h in live if h != head]
            kept = torch.cat([torch.arange(h * d, (h + 1) * d) for h in rest])
            costs[head] = loss(W, H, kept)
        live.remove(min(costs, key=costs.get))
        assert select_heads(W, H, heads, len(live)).tolist() == live


def test_groups_lose_equally_many_heads():
    W, H = problem(12 * 2, seed=4)
    kept = select_heads(W, H, 12, 6, groups=3)
    assert [sum(g * 4 <= h < (g + 1) * 4 for h in kept.tolist()) for g in range(3)] == [2, 2, 2]


@given(n=st.integers(3, 12), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_elimination_is_least_squares_and_the_down_dated_inverse_is_a_fresh_one(n, seed, data):
    W, H = problem(n, seed=seed)
    columns = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))))
    step = Elimination(W, inverse(H), len(columns))
    step.remove(columns)
    rest = step.live.nonzero().squeeze(1)
    assert rest.tolist() == others(n, columns).tolist()
    assert step.columns[columns].abs().max() == 0
    fresh = torch.linalg.inv(H[rest][:, rest])
    H_inv_rest, W_rest = step.rows(rest)[:, rest], step.columns[rest].T
    torch.testing.assert_close(step.diagonal[rest], H_inv_rest.diagonal(), rtol=1e-7, atol=0)
    assert (H_inv_rest - fresh).abs().max() <= 1e-7 * fresh.abs().max()
    expected = (W @ H)[:, rest] @ fresh
    assert (W_rest - expected).abs().max() <= 1e-7 * max(1.0, float(expected.abs().max()))


def test_removal_in_any_order_ends_at_the_closed_form():
    W, H = problem(10, seed=5)
    kept = torch.tensor([1, 4, 6, 9])
    expected = reconstruct(W @ H, H, kept)
    for order in ([0, 2, 3, 5, 7, 8], [8, 7, 5, 3, 2, 0], [3, 8, 0, 7, 2, 5]):
        step = Elimination(W, inverse(H), len(order))
        for column in order:
            step.remove(torch.tensor([column]))
        torch.testing.assert_close(step.columns[kept].T, expected, rtol=1e-7, atol=1e-8)


@given(n=st.integers(2, 20), out=st.integers(1, 6), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_repair_is_the_closed_form(n, out, seed, data):
    W, H = problem(n, out, seed=seed)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))))
    expected = (W @ H)[:, kept] @ torch.linalg.inv(H[kept][:, kept])
    repaired = reconstruct(W @ H, H, kept)
    assert (repaired - expected).abs().max() <= 1e-7 * max(1.0, float(expected.abs().max()))
    if len(kept) == n:
        assert relative_error(W, repaired, H, kept) < 1e-12


def test_relative_error_is_the_error_on_the_tokens():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=generator, dtype=torch.float64)
    W = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    H, kept = x.T @ x / 100, torch.tensor([0, 2, 3, 7])
    W_kept = reconstruct(W @ H, H, kept)
    expected = (x @ W.T - x[:, kept] @ W_kept.T).square().sum() / (x @ W.T).square().sum()
    assert relative_error(W, W_kept, H, kept) == pytest.approx(float(expected), rel=1e-9)
    assert relative_error(torch.zeros_like(W), torch.zeros_like(W_kept), H, kept) == 0.0


def test_channels_one_at_a_time_follow_brute_force():
    n = 8
    W, H = problem(n, seed=6)
    live = list(range(n))
    for keep in range(n - 1, 3, -1):
        live.remove(min(live, key=lambda c: loss(W, H, torch.tensor([i for i in live if i != c]))))
        assert select_channels(W, H, keep, sizes=[1] * (n - keep)).tolist() == live


def test_first_group_of_channels_has_the_lowest_scores():
    W, H = problem(30, seed=7)
    scores = W.square().sum(0) / torch.linalg.inv(H).diagonal()
    kept = select_channels(W, H, 22, sizes=[8])
    assert set(range(30)) - set(kept.tolist()) == set(scores.argsort()[:8].tolist())


def test_greedy_channels_are_near_the_best_of_all_subsets():
    ratios = []
    for seed in range(6):
        W, H = problem(10, seed=seed)
        best = min(loss(W, H, torch.tensor(subset)) for subset in itertools.combinations(range(10), 6))
        ratios.append(loss(W, H, select_channels(W, H, 6, sizes=[1] * 4)) / best)
    assert min(ratios) >= 1 - 1e-9  # nothing beats brute force
    assert sum(ratios) / len(ratios) < 1.5


@given(st.integers(0, 20_000))
def test_dynamic_group_size(remove):
    sizes = group_sizes(remove)
    assert sum(sizes) == remove
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert all(size >= 8 for size in sizes[:-1])
    assert all(size <= 1024 for size in sizes)
    if remove >= 16:
        assert sizes[0] == min(remove // 2, 1024)


def test_dynamic_group_size_halves():
    assert group_sizes(2000)[:4] == [1000, 500, 250, 125]
    assert group_sizes(5000)[:3] == [1024, 512, 256]


def test_arguments_that_do_not_fit():
    W, H = problem(12)
    with pytest.raises(ValueError, match="cannot keep"):
        select_heads(W, H, 5, 3)
    with pytest.raises(ValueError, match="cannot keep"):
        select_heads(W, H, 6, 0)
    with pytest.raises(ValueError, match="cannot keep"):
        select_heads(W, H, 6, 5, groups=3)
    with pytest.raises(ValueError, match="do not remove"):
        select_channels(W, H, 6, sizes=[3])


def test_a_singular_hessian_is_an_error():
    x = torch.ones(5, 4, dtype=torch.float64)
    W = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        select_channels(W, x.T @ x, 2)
