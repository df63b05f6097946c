"""The benchmark behind benchmarks/results/recovery.md, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "recovery.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_recovery", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # The text is short: taken once, it could end before the time does.
    monkeypatch.setattr(module, "SHARED", {**module.SHARED, "max_length": 24, "epochs": 2.0})
    return module


def test_the_gap_is_measured_in_log_perplexity(benchmark):
    assert benchmark.closed(10, 40, 20) == pytest.approx(0.5)
    assert benchmark.closed(10, 40, 40) == 0


@pytest.mark.slow
def test_the_benchmark_trains_for_the_time_given_and_writes_its_page(benchmark, dense_folder, text_file, tmp_path):
    """Half a minute of CPU time."""
    text = text_file.read_text()
    for name, content in {
        "c4/c4_train_shard0_first1000.jsonl": "\n".join(json.dumps({"text": line}) for line in text.splitlines()),
        "alpaca/alpaca_data_cleaned.json": json.dumps([{"instruction": "the", "output": text[:200]}] * 20),
        "wikitext2/wiki.valid.tokens": text,
        "wikitext2/wiki.test.raw": text,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    small = {"ratios": "0.4", "methods": "distill,lora", "core_minutes": 0.1}
    short = {"num_samples": 8, "seq_len": 24, "window": 24, "max_tokens": 480}
    out = tmp_path / "results" / "page"
    benchmark.main(tmp_path, tmp_path / "work", out, model=str(dense_folder), test=True, **small, **short)
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["distill", "lora"]
    for row in rows:
        assert row["steps"] == 1 or row["core_minutes"] == pytest.approx(0.1, rel=0.5)
        assert row["closed"]["test"] > 0
    assert "gap closed" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
