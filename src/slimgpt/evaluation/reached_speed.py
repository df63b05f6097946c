"""A dense and a slim model timed in turn, from their widths alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from slimgpt.evaluation.layer_times import ROUNDS, OnTimed
from slimgpt.evaluation.speed import measure_speed
from slimgpt.models.architecture import Sizes
from slimgpt.models.random_weights import random_model
from slimgpt.runtime.memory import free_bytes

MEMORY_SHARE = 0.8
"""Share of the free memory that both models may take."""


def reached_speed(
    model_config: PreTrainedConfig,
    dense: Sequence[Sizes],
    slim: Sequence[Sizes],
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    parameters: int,
    rounds: int = ROUNDS,
    on_timed: OnTimed | None = None,
) -> dict[str, Any]:
    """A whole dense and a whole slim model timed in turn, and how many times as fast the slim one is; or why not.

    Args:
        dense: the widths of every layer before.
        slim: the widths after.
        parameters: of both models together.
        rounds: timed rounds, after one that is not counted.

    Returns:
        ``reached``, and the seconds of ``prompt`` and ``new_tokens`` by ``dense`` and ``slim``; or ``not_timed``.
    """
    needed, free = parameters * dtype.itemsize, free_bytes(device)
    if needed > MEMORY_SHARE * free:
        return {
            "reached": None,
            "not_timed": f"the dense and the slim model take {needed / 1e9:.1f} GB together, and "
            f"{free / 1e9:.1f} GB are free",
        }
    start = time.perf_counter()

    def step(done: int, total: int) -> None:
        nonlocal start
        if on_timed:
            on_timed(done - 1, total, time.perf_counter() - start)
        start = time.perf_counter()

    models = [random_model(model_config, sizes, device, dtype) for sizes in (dense, slim)]
    speeds = measure_speed(models, prompt, new_tokens, rounds, step, batch)
    seconds = [
        {"prompt": batch * prompt / speed.prefill, "new_tokens": batch * new_tokens / speed.decode} for speed in speeds
    ]
    before, after = (sum(each.values()) for each in seconds)
    return {"reached": before / after, "dense": seconds[0], "slim": seconds[1]}
