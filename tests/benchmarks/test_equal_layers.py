"""The table of equal layers: increases at the same size, and what is known without measuring."""

from __future__ import annotations

import math

import pytest
from equal_layers import EQUAL, interpolated, table
from quality_table.increases import PROSE
from quality_table.rows import DENSE, Result, Row


def test_an_exponential_is_interpolated_exactly_and_measured_values_are_kept():
    values = {ratio: 0.1 * math.exp(3 * ratio) for ratio in (0.5, 0.2, 0.33)}
    for at in (0.1, 0.2, 0.21, 0.4, 0.6):
        assert interpolated(values, at) == pytest.approx(0.1 * math.exp(3 * at), rel=1e-12)
    assert interpolated({0.2: 1.0}, 0.2) is None


def test_equal_layers_stand_beside_the_increase_by_layer_at_their_own_size():
    by_layer = {0.2: 0.3, 0.4: 1.2}
    rows = [(Row("smollm2", DENSE, 0.0), _result(0.0, 0.0))]
    rows += [(Row("smollm2", "slimgpt", ratio), _result(value, ratio)) for ratio, value in by_layer.items()]
    rows += [(Row("smollm2", EQUAL, 0.2), _result(0.9, 0.3))]
    head, _, *lines = (line.strip("| ").split("|") for line in table(rows))
    place = [name.strip() for name in head].index("mean at equal size")
    assert [line[place].strip() for line in lines] == ["", "", "1.50"]  # 0.3 of 0.9 beside sqrt(0.3 * 1.2)


def _result(increase: float, achieved: float) -> Result:
    measures = {name: {"value": 10 * math.exp(increase)} for name in PROSE}
    return Result({}, {}, {"achieved": achieved, "core_seconds": 1.0}, measures)
