"""Monotone interpolation against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest

from slimgpt.scanning.interpolation import MonotoneCurve, expit, logit

interpolate = pytest.importorskip("scipy.interpolate")


@pytest.mark.parametrize("count", [3, 4, 7])
@pytest.mark.parametrize("kind", ["rising", "falling", "any"])
def test_curves_are_those_of_scipy_between_the_ends(count, kind):
    generator = np.random.default_rng(count)
    for _ in range(20):
        x = np.sort(generator.normal(size=count))
        y = generator.normal(size=count)
        y = {"rising": np.sort(y), "falling": -np.sort(y), "any": y}[kind]
        ours, theirs = MonotoneCurve(tuple(x), tuple(y)), interpolate.PchipInterpolator(x, y)
        at = np.linspace(x[0], x[-1], 50)
        assert [ours(value) for value in at] == pytest.approx(theirs(at), abs=1e-9)


def test_a_curve_goes_on_straight_beyond_its_ends_and_through_its_points():
    curve = MonotoneCurve((0.0, 1.0, 3.0), (0.0, 2.0, 3.0))
    assert [curve(x) for x in curve.x] == list(curve.y)
    for end, outside in ((0, (-1.0, -2.0, -3.0)), (-1, (4.0, 5.0, 6.0))):
        steps = np.diff([curve(x) for x in (curve.x[end], *outside)])
        assert steps == pytest.approx([steps[0]] * 3)
        assert steps[0] == pytest.approx(curve.slopes[end] * (-1 if end == 0 else 1))


def test_two_points_are_a_line_and_one_is_constant():
    assert MonotoneCurve((1.0, 2.0), (3.0, 5.0))(4.0) == pytest.approx(9.0)
    assert MonotoneCurve((1.0,), (3.0,))(9.0) == 3.0


@pytest.mark.parametrize("x", [(), (1.0, 1.0), (2.0, 1.0), (1.0, 2.0, 3.0)])
def test_places_that_do_not_ascend_are_refused(x):
    with pytest.raises(ValueError, match="must be ascending"):
        MonotoneCurve(x, (0.0, 1.0))


def test_logit_and_its_inverse():
    special = pytest.importorskip("scipy.special")
    shares = [0.01, 0.3, 0.5, 0.97]
    assert [logit(share) for share in shares] == pytest.approx(special.logit(shares))
    assert [expit(logit(share)) for share in (*shares, 1 - 1e-9)] == pytest.approx([*shares, 1 - 1e-6])
