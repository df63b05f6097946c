"""The paper's ablations as rows: what each part of the method gives, and what the calibration text does."""

from __future__ import annotations

from collections.abc import Iterator

from slimgpt.planning.ratios import RATIOS
from slimgpt.solver import CRITERIA
from yardstick.rows import Row
from yardstick.texts import SOURCES

PARTS = ("paper-no-gcd", "paper-no-dgs")
"""Criteria without grouped Cholesky, and without dynamic group size."""

NUM_SAMPLES = (32, 64, 128, 256, 512)
SEQ_LENS = (64, 128, 256, 512, 1024, 2048)


def ablation_rows(models: list[str], ratio: float, methods: tuple[str, ...] = ("paper", "slimgpt")) -> Iterator[Row]:
    """One row per change.

    Args:
        methods: those whose calibration is varied; the method's own parts are varied for `paper`.
    """
    for model in models:
        for part in PARTS:
            if part in CRITERIA:
                yield Row(model, part, ratio)
        for schedule in RATIOS:
            yield Row(model, "paper", ratio, changes=(("schedule", schedule),))
        for method in methods:
            for count in NUM_SAMPLES:
                yield Row(model, method, ratio, changes=(("num_samples", count),))
            for length in SEQ_LENS:
                yield Row(model, method, ratio, changes=(("seq_len", length),))
            for source in SOURCES:
                yield Row(model, method, ratio, changes=(("source", source),))
