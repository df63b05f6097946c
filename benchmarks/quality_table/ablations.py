"""The paper's ablations as rows: what each part of the method gives, and what the calibration text does."""

from __future__ import annotations

from collections.abc import Iterator

from quality_table.rows import DENSE, Row
from quality_table.run import Settings
from slimgpt.planning.schedules import RATIOS

PARTS = ("paper-no-gcd", "paper-no-dgs")
"""Criteria without grouped Cholesky, and without dynamic group size."""

NUM_SAMPLES = (32, 64, 128, 256, 512)
SOURCES = ("c4", "alpaca", "wikitext2", "auto")
"""Calibration texts; `benchmarks/calibration_text.py` compares more of them."""

SEQ_LENS = (64, 128, 256, 512, 1024, 2048)


def ablation_rows(
    models: list[str], ratio: float, settings: Settings, methods: tuple[str, ...] = ("paper", "slimgpt")
) -> Iterator[Row]:
    """For every model the methods as they are, and one row per change; a change to what already holds is left out.

    Args:
        methods: those whose calibration is varied; the method's own parts are varied for `paper`.
    """
    usual = {"num_samples": settings.num_samples, "seq_len": settings.seq_len, "source": settings.source}
    varied = {"num_samples": NUM_SAMPLES, "seq_len": SEQ_LENS, "source": SOURCES}
    for model in models:
        yield Row(model, DENSE, 0.0)
        yield Row(model, "paper", ratio)
        for part in PARTS:
            yield Row(model, part, ratio)
        for schedule in RATIOS:
            if schedule != "log_increase":
                yield Row(model, "paper", ratio, changes=(("schedule", schedule),))
        for method in methods:
            if method != "paper":
                yield Row(model, method, ratio)
            for name, values in varied.items():
                for value in values:
                    if value != usual[name]:
                        yield Row(model, method, ratio, changes=((name, value),))
