"""Measurements of one model, and the peak memory of pruning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimgpt.evaluation.evaluate import evaluate
from slimgpt.evaluation.speed import measure_speed, peak_memory
from slimgpt.io.weight_files import weight_bytes
from slimgpt.models.loading import load
from slimgpt.models.source import locate
from slimgpt.reproducing.recipe import Evaluation
from slimgpt.runtime.devices import as_device

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_model(
    model: str, evaluation: Evaluation, device: str, dtype: str, data_dir: Path | None
) -> tuple[dict[str, float], dict[str, Any]]:
    """The figures of a model by column, and the protocols and reports behind them."""
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    loaded, tokenizer = load(model, dtype, device)
    figures["parameters"] = sum(parameter.numel() for parameter in loaded.parameters())
    if "perplexity" in evaluation.measure:
        for text in evaluation.texts:
            for window in evaluation.windows:
                result = evaluate(
                    loaded, tokenizer, text, window=window, max_tokens=evaluation.max_tokens, data_dir=data_dir
                )
                figures[perplexity_column(text, window)] = result.perplexity
                details[perplexity_column(text, window)] = result.to_json()
    if "tasks" in evaluation.measure:
        from slimgpt.evaluation.tasks import evaluate_tasks

        scores = evaluate_tasks(
            loaded,
            tokenizer,
            evaluation.tasks,
            limit=evaluation.limit,
            num_fewshot=evaluation.num_fewshot,
            data_dir=data_dir,
        )
        if scores.mean is not None:
            figures[f"{evaluation.tasks} (mean, %)"] = 100 * scores.mean
        details[evaluation.tasks] = scores.to_json()
    if "speed" in evaluation.measure:
        speed = measure_speed([loaded], evaluation.prompt, evaluation.new_tokens)[0]
        figures["prefill tokens/s"], figures["decode tokens/s"] = speed.prefill, speed.decode
        figures["seconds per token"] = 1 / speed.decode
        source = locate(model)
        target = as_device(device)
        if source.folder is not None and not source.gguf_file:
            del loaded
            figures["peak memory, GB"] = peak_memory(source, str(target)) / 1e9
            figures["weights, GB"] = weight_bytes(source.folder) / 1e9
    return figures, details


def perplexity_column(text: str, window: int) -> str:
    """The name of a column: a perplexity means nothing without its window."""
    return f"{Path(text).name} perplexity @{window}"


@dataclass
class Peak:
    """Peak memory in bytes; ``None`` where the system does not report it."""

    bytes: int | None = None


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of a block: of the GPU, or of this process on Linux."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    resettable = False
    with suppress(OSError):
        CLEAR.write_text("5")  # forget the peak so far
        resettable = True
    yield peak
    if resettable:
        match = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())
        peak.bytes = 1024 * int(match[1]) if match else None
