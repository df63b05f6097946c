"""The baselines' scores against their formulas, and what every criterion promises."""

import pytest
import torch

from slimgpt.solver import CRITERIA, select_channels, select_heads
from slimgpt.solver.obs import constant_group_sizes


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 24)
    return torch.randn(9, 24, generator=generator, dtype=torch.float64), x.T @ x / 300


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_keeps_what_is_asked(name, problem):
    W, H = problem
    heads = CRITERIA[name].heads(W, H, 6, 4, 2, generator())
    assert heads.tolist() == sorted(set(heads.tolist()))
    assert [sum(int(h) // 3 == g for h in heads) for g in range(2)] == [2, 2]
    channels = CRITERIA[name].channels(W, H, 13, generator())
    assert len(set(channels.tolist())) == 13
    assert channels.tolist() == sorted(channels.tolist())


def test_magnitude_and_wanda_formulas(problem):
    W, H = problem
    by_norm = W.square().sum(0).argsort(descending=True)[:10].sort().values
    assert CRITERIA["magnitude"].channels(W, H, 10, generator()).tolist() == by_norm.tolist()
    score = torch.stack([W[:, j].abs().sum() * H[j, j].sqrt() for j in range(24)])
    by_wanda = score.argsort(descending=True)[:10].sort().values
    assert CRITERIA["wanda"].channels(W, H, 10, generator()).tolist() == by_wanda.tolist()
    by_head = score.view(6, 4).sum(1).argsort(descending=True)[:3].sort().values
    assert CRITERIA["wanda"].heads(W, H, 6, 3, 1, generator()).tolist() == by_head.tolist()


def test_random_follows_the_seed(problem):
    W, H = problem
    first, again = (CRITERIA["random"].channels(W, H, 12, generator()) for _ in range(2))
    other = CRITERIA["random"].channels(W, H, 12, torch.Generator().manual_seed(2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_paper_and_ours_differ_only_in_the_head_score(problem):
    W, H = problem
    assert CRITERIA["paper"].channels(W, H, 12, generator()).equal(CRITERIA["slimgpt"].channels(W, H, 12, generator()))
    for name, score in (("paper", "grouped_cholesky"), ("slimgpt", "exact"), ("paper-no-gcd", "diagonal")):
        assert CRITERIA[name].heads(W, H, 6, 3, 1, generator()).equal(select_heads(W, H, 6, 3, 1, score))
    # The benchmarks' tests add a criterion of their own.
    repaired = {name for name, criterion in CRITERIA.items() if criterion.repair and name != "obs-uniform"}
    assert repaired == {"slimgpt", "paper", "paper-no-gcd", "paper-no-dgs"}


def test_ablation_of_dynamic_groups_takes_groups_of_128_and_the_rest():
    assert constant_group_sizes(300) == [128, 128, 44]
    generator_, W = torch.Generator().manual_seed(3), torch.randn(4, 160, dtype=torch.float64)
    x = torch.randn(400, 160, generator=generator_, dtype=torch.float64)
    H = x.T @ x / 400
    kept = CRITERIA["paper-no-dgs"].channels(W, H, 10, generator())
    assert kept.equal(select_channels(W, H, 10, [128, 22]))
