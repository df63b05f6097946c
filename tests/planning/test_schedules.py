"""The ratio strategies: mean, bounds and order."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimgpt.errors import PlanError
from slimgpt.planning import RATIOS, layer_ratios

names = st.sampled_from(sorted(RATIOS))


@given(name=names, n=st.integers(1, 128), ratio=st.floats(0.001, 0.95))
def test_mean_and_bounds(name, n, ratio):
    ratios = layer_ratios(name, n, ratio)
    assert len(ratios) == n
    assert sum(ratios) / n == pytest.approx(ratio, abs=1e-9)
    assert all(0 < r < 1 for r in ratios)


@given(name=names, n=st.integers(2, 128), ratio=st.floats(0.01, 0.9))
def test_order(name, n, ratio):
    ratios = layer_ratios(name, n, ratio)
    steps = [later - earlier for earlier, later in itertools.pairwise(ratios)]
    if name.endswith("increase"):
        assert all(step >= -1e-12 for step in steps)
    elif name.endswith("decrease"):
        assert all(step <= 1e-12 for step in steps)
    else:
        assert len(set(ratios)) == 1


def test_log_increase_is_the_papers_curve():
    ratios = layer_ratios("log_increase", 32, 0.2)
    assert ratios[0] == pytest.approx(0.0625)  # the first layer of the paper's 20% run on 32 layers
    first, last = ratios[0], ratios[-1]
    for i, r in enumerate(ratios):
        assert r == pytest.approx(first + (last - first) * math.log(1 + i) / math.log(32))


def test_linear_increase_is_a_line():
    ratios = layer_ratios("linear_increase", 10, 0.3)
    steps = {round(later - earlier, 12) for earlier, later in itertools.pairwise(ratios)}
    assert len(steps) == 1
    assert steps.pop() > 0


def test_decreases_are_increases_reversed():
    for kind in ("log", "linear"):
        assert layer_ratios(f"{kind}_decrease", 9, 0.4) == layer_ratios(f"{kind}_increase", 9, 0.4)[::-1]


def test_a_list_is_taken_as_it_is():
    assert layer_ratios([0.0, 0.5, 0.25], 3) == [0.0, 0.5, 0.25]
    assert layer_ratios([0.1, 0.3], 2, 0.2) == [0.1, 0.3]


@pytest.mark.parametrize(
    ("schedule", "n", "ratio", "message"),
    [
        ("log_increase", 4, 0.0, "outside"),
        ("log_increase", 4, 1.0, "outside"),
        ("log_increase", 4, float("nan"), "outside"),
        ("cosine", 4, 0.2, "unknown"),
        ([0.1, 0.2], 3, None, "lists 2 ratios"),
        ([0.1, 1.0], 2, None, "layer 1"),
        ([0.1, -0.1], 2, None, "layer 1"),
        ([0.0, 0.0], 2, None, "nothing to remove"),
        ([0.1, 0.3], 2, 0.5, "mean"),
    ],
)
def test_errors(schedule, n, ratio, message):
    with pytest.raises(PlanError, match=message):
        layer_ratios(schedule, n, ratio)
