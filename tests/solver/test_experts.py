"""Mixtures of experts against brute force over whole mixtures, in fp64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from slimgpt.solver import Gram, reconstruct, select_channels
from slimgpt.solver.experts import OutputGram, Routing, contributions, expert_scores, select_experts

TOKENS, HIDDEN, CHANNELS, EXPERTS, K = 300, 5, 8, 6, 2


class Mixture:
    """Random experts behind a random router, every quantity in fp64."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.up, self.W = draw(TOKENS, HIDDEN), draw(EXPERTS, CHANNELS, HIDDEN), draw(EXPERTS, HIDDEN, CHANNELS)
        values, self.index = draw(TOKENS, EXPERTS).softmax(-1).topk(K)
        self.p = values / values.sum(-1, keepdim=True)

    def h(self, expert, x=None):
        return F.silu((self.x if x is None else x) @ self.up[expert].T)

    def output(self, W, columns=None, scales=None):
        """The mixture token by token, from the definition."""
        y = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for token, slot in itertools.product(range(TOKENS), range(K)):
            e = int(self.index[token, slot])
            h = self.h(e, self.x[token])
            h = h if columns is None else h[columns[e]]
            y[token] += self.p[token, slot] * (W[e] @ h) * (1 if scales is None else scales[e])
        return y


def test_routing_lists_every_token_of_every_expert_once():
    m = Mixture()
    routing = Routing(m.index, m.p, EXPERTS)
    assert sum(routing.counts) == TOKENS * K
    for expert in range(EXPERTS):
        rows = [t for t in range(TOKENS) if expert in m.index[t].tolist()]
        assert routing.rows(expert).tolist() == rows
        assert routing.counts[expert] == len(rows)
        slots = [m.index[t].tolist().index(expert) for t in rows]
        assert routing.slots(expert).tolist() == slots
        assert torch.equal(routing.weights(expert).squeeze(1), m.p[rows, slots])


def test_an_expert_nobody_chose_has_no_tokens():
    routing = Routing(torch.tensor([[0, 2], [2, 0]]), torch.ones(2, 2), 4)
    assert routing.counts == [2, 0, 2, 0]
    assert routing.rows(3).numel() == 0


def test_contributions_add_up_to_the_mixture():
    m = Mixture(1)
    outputs = contributions(Routing(m.index, m.p, EXPERTS), m.x, K, HIDDEN, lambda e, x: m.h(e, x) @ m.W[e].T)
    torch.testing.assert_close(outputs.sum(1), m.output(m.W), rtol=1e-12, atol=1e-12)


def test_the_weighted_hessian_gives_the_best_matrix_of_an_expert_in_the_whole_mixture():
    """Least squares on the output of the mixture, all other experts as they are, from the definition."""
    m = Mixture(2)
    expert, columns = 3, torch.tensor([0, 2, 5])
    routing = Routing(m.index, m.p, EXPERTS)
    rows, p = routing.rows(expert), routing.weights(expert)
    gram = Gram(CHANNELS, dtype=torch.float64)
    gram.add(m.h(expert, m.x[rows]) * p)
    H = gram.mean()
    repaired = reconstruct(m.W[expert] @ H, H, columns)

    others = m.output(torch.stack([W if e != expert else W * 0 for e, W in enumerate(m.W)]))
    target = m.output(m.W) - others
    design = torch.zeros(TOKENS, 3, dtype=torch.float64)
    design[rows] = m.h(expert, m.x[rows])[:, columns] * p
    expected = torch.linalg.lstsq(design, target).solution.T
    torch.testing.assert_close(repaired, expected, rtol=1e-9, atol=1e-9)


def test_weights_of_the_router_decide_which_channels_stay():
    """A channel that matters only where the router hardly listens goes first."""
    h = torch.zeros(200, 2, dtype=torch.float64)
    h[:100, 0] = 3.0
    h[100:, 1] = 1.0
    p = torch.cat([torch.full((100, 1), 0.1), torch.full((100, 1), 0.9)]).double()
    W = torch.ones(4, 2, dtype=torch.float64)
    weighted, plain = Gram(2, dtype=torch.float64), Gram(2, dtype=torch.float64)
    weighted.add(h * p)
    plain.add(h)
    assert select_channels(W, weighted.mean(), 1).tolist() == [1]
    assert select_channels(W, plain.mean(), 1).tolist() == [0]


def test_output_gram_holds_the_inner_products_of_the_definition():
    m = Mixture(4)
    routing = Routing(m.index, m.p, EXPERTS)
    target = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    gram = OutputGram(EXPERTS)
    outputs = contributions(routing, m.x, K, HIDDEN, lambda e, x: m.h(e, x) @ m.W[e].T)
    for part in torch.arange(TOKENS).split(70):
        gram.add(m.index[part], outputs[part], target[part])
    single = [m.output(torch.stack([W * (e == one) for e, W in enumerate(m.W)])) for one in range(EXPERTS)]
    expected = torch.tensor([[float((a * b).sum()) for b in single] for a in single], dtype=torch.float64)
    torch.testing.assert_close(gram.C, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gram.c, torch.stack([(a * target).sum() for a in single]), rtol=1e-10, atol=1e-10)
    assert float(gram.total) == pytest.approx(float(target.square().sum()))
    assert gram.norms is gram.counts is None  # only REAP asks for them
    with pytest.raises(ValueError, match="norms=True"):
        gram.saliency()


def test_reap_goes_by_the_mean_over_an_experts_tokens_of_gate_times_norm():
    """From the definition (arXiv 2510.13999), token by token: a rare expert that speaks up counts as much as a busy
    one, where the energy that it puts into the output is less."""
    m = Mixture(8)
    routing = Routing(m.index, m.p, EXPERTS)
    gram = OutputGram(EXPERTS, norms=True)
    outputs = contributions(routing, m.x, K, HIDDEN, lambda e, x: m.h(e, x) @ m.W[e].T)
    for part in torch.arange(TOKENS).split(90):
        gram.add(m.index[part], outputs[part], outputs[part].sum(1))
    expected = []
    for expert in range(EXPERTS):
        values = [
            float(m.p[t, s] * (m.W[expert] @ m.h(expert, m.x[t])).norm())
            for t, s in itertools.product(range(TOKENS), range(K))
            if m.index[t, s] == expert
        ]
        expected.append(sum(values) / len(values))
    generator = torch.Generator().manual_seed(0)
    scores = expert_scores("reap", gram, torch.zeros(EXPERTS), generator)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0.0)
    energy = expert_scores("slimgpt", gram, torch.zeros(EXPERTS), generator)
    rare = OutputGram(2, norms=True)
    rare.add(
        torch.tensor([[0]] * 9 + [[1]]),
        torch.cat([torch.ones(9, 1, 1), torch.full((1, 1, 1), 2.0)]),
        torch.zeros(10, 1),
    )
    assert expert_scores("reap", rare, energy[:2], generator).argmax() == 1
    assert expert_scores("slimgpt", rare, energy[:2], generator).argmax() == 0


def test_scales_are_the_least_squares_solution_and_the_error_is_what_they_leave():
    m = Mixture(5)
    routing = Routing(m.index, m.p, EXPERTS)
    target = m.output(m.W * 1.3) + 0.1
    outputs = contributions(routing, m.x, K, HIDDEN, lambda e, x: m.h(e, x) @ m.W[e].T)
    gram = OutputGram(EXPERTS)
    gram.add(m.index, outputs, target)
    scales = gram.scales(0.0)
    design = torch.stack(
        [m.output(torch.stack([W * (e == one) for e, W in enumerate(m.W)])).flatten() for one in range(EXPERTS)], 1
    )
    torch.testing.assert_close(scales, torch.linalg.lstsq(design, target.flatten()).solution, rtol=1e-9, atol=1e-9)
    left = (target - m.output(m.W, scales=scales)).square().sum() / target.square().sum()
    assert gram.error(scales) == pytest.approx(float(left), rel=1e-9)
    assert gram.error(scales) <= gram.error(torch.ones(EXPERTS, dtype=torch.float64))


def test_scales_of_the_mixtures_own_output_are_one_and_unseen_experts_keep_theirs():
    m = Mixture(6)
    index = m.index.clamp(max=EXPERTS - 2)  # nobody chooses the last expert
    index[index[:, 0] == index[:, 1], 1] = 0
    index[(index == 0).all(1), 1] = 1
    routing = Routing(index, m.p, EXPERTS)
    outputs = contributions(routing, m.x, K, HIDDEN, lambda e, x: m.h(e, x) @ m.W[e].T)
    gram = OutputGram(EXPERTS)
    gram.add(index, outputs, outputs.sum(1))
    assert routing.counts[-1] == 0
    for damping in (0.0, 0.01):
        torch.testing.assert_close(gram.scales(damping), torch.ones(EXPERTS, dtype=torch.float64))
    assert gram.error(gram.scales(0.01)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_selection_of_experts_is_the_best_subset_with_equal_groups(groups):
    scores = torch.tensor([0.3, 0.9, 0.2, 0.8, 0.7, 0.1])
    size = EXPERTS // groups

    def equal(subset):
        return len({sum(e // size == g for e in subset) for g in range(groups)}) == 1

    for keep in range(groups, EXPERTS + 1, groups):
        subsets = [s for s in itertools.combinations(range(EXPERTS), keep) if equal(s)]
        best = max(subsets, key=lambda subset: sum(float(scores[e]) for e in subset))
        assert select_experts(scores, keep, groups).tolist() == list(best)
    with pytest.raises(ValueError, match="cannot keep"):
        select_experts(scores, EXPERTS + 1, groups)
