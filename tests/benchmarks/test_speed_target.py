"""The table of a target in speed: both plans promise the same speed, and finished parts are not worked out again."""

from __future__ import annotations

import json

import pytest
import speed_target

import slimgpt
import slimgpt.evaluation.layer_times as layer_times
from slimgpt.evaluation.layer_times import Seconds
from slimgpt.models.parameter_counts import count

REQUEST = {"num_samples": 8, "seq_len": 24, "prompt": 16, "new_tokens": 4}


@pytest.mark.slow
def test_both_plans_promise_the_same_speed_and_a_second_run_works_nothing_out(
    dense_folder, data_folder, tmp_path, monkeypatch
):
    def seconds(model, *_):
        each = 1e-2 + 1e-6 * count(model.model.layers)
        return Seconds(each / 2, each / 8)

    monkeypatch.setattr(layer_times, "request_seconds", seconds)
    options = {**REQUEST, "model": str(dense_folder), "speedups": "1.2", "rounds": 1, "window": 24, "max_tokens": 200}
    speed_target.main(tmp_path / "work", tmp_path / "table", data=data_folder, **options)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["form"] for row in rows] == ["speed", "ratio"]
    fast, alone = (row["promised"] for row in rows)
    assert 1.2 <= fast <= alone * (1 + 1e-9)
    assert alone == pytest.approx(fast, rel=0.02)
    assert all(row["reached"] > 0 and {"WikiText-2", "C4, held out"} <= set(row["kl"]) for row in rows)
    page = (tmp_path / "table.md").read_text()
    assert "| 1.2 | ratio alone |" in page
    assert "- 1.2: mean KL" in page

    def never(*_, **__):
        raise AssertionError("worked out again")

    for name in ("load", "evaluate"):
        monkeypatch.setattr(slimgpt, name, never)
    monkeypatch.setattr(layer_times, "request_seconds", never)
    monkeypatch.setattr(speed_target, "measure_speed", never)
    (tmp_path / "table.md").unlink()
    speed_target.main(tmp_path / "work", tmp_path / "table", data=data_folder, **options)
    assert (tmp_path / "table.md").read_text() == page
