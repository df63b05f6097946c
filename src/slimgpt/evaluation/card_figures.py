"""Figures of a model as its report and card hold them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.tasks import TaskScores, metric_of


def text_figures(text: str, result: Perplexity) -> dict[str, Any]:
    """Perplexity on a text, and the divergence from the base where it was measured.

    Args:
        text: the name of the text; of a file only its own name is kept.
    """
    figures: dict[str, Any] = {
        "text": Path(text).name,
        "window": result.window,
        "stride": result.protocol["stride"],
        "tokens": result.predicted,
        "text_sha256": result.protocol["text_sha256"],
        "dtype": result.protocol["dtype"],
        "perplexity": result.perplexity,
    }
    divergence = result.divergence
    if divergence is None:
        return figures
    return {
        **figures,
        "base": Path(divergence.base).name,
        "base_perplexity": divergence.base_perplexity,
        "kl_divergence": divergence.kl.mean,
        "kl_stderr": divergence.kl.stderr,
        "bits_per_byte": divergence.bits_per_byte,
        "same_top": divergence.same_top,
    }


def task_figures(scores: TaskScores) -> list[dict[str, Any]]:
    """The score of every task that was asked for, with its standard error; of generated answers also how they end."""
    figures = []
    for task in scores.protocol["tasks"]:
        metrics = scores.scores.get(task, {})
        metric = metric_of(metrics)
        ending = scores.endings.get(task)
        if metric is not None:
            figures.append(
                {
                    "task": task,
                    "metric": metric,
                    "value": metrics[metric],
                    "stderr": metrics.get(f"{metric}_stderr"),
                    "rows": int(metrics.get("rows", 0)),
                    "num_fewshot": scores.protocol["num_fewshot"].get(task),
                    "harness": scores.protocol["harness"],
                    **({} if ending is None else {"endings": asdict(ending)}),
                }
            )
    return figures
