"""Increases of log-perplexity over the dense model: what tables of them measure, their cells, and their pages."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from quality_table.rows import Result, Row, Store
from quality_table.run import KL, Bench, Settings
from quality_table.texts import CHAT, Texts

TEXTS = (("wikitext2", 512), ("c4", 512), ("speeches", 512))
PROSE = tuple(f"{name}@{window}" for name, window in TEXTS)
MEAN_KL = "KL"
COLUMNS = (*PROSE, "mean", CHAT, MEAN_KL)
HEADINGS = " | ".join(name.partition("@")[0] for name in COLUMNS)

DataFolder = Annotated[Path, typer.Option(help="Folder of texts, as benchmarks/quality.py has it.")]
RowsFolder = Annotated[Path, typer.Option(help="Folder of finished rows.")]
PagePath = Annotated[Path | None, typer.Option(help="Write page and JSON there; without a suffix.")]
MaxTokens = Annotated[int, typer.Option(help="Of each held-out text.")]
ForwardDtype = Annotated[str, typer.Option(help="Of forward passes: float32, or bfloat16 where it is faster.")]
KeepModels = Annotated[bool, typer.Option("--keep-models", help="Keep the slim models beside the rows.")]
Known = Annotated[bool, typer.Option("--known", help="Measure nothing: write the rows that are known.")]


def bench_of(data: Path, keep: Path, keep_models: bool, **settings: Any) -> Bench:
    """What measures the rows of such a table.

    Args:
        data: the folder of texts.
        keep: the folder of finished rows.
        settings: those of :class:`Settings` that differ from the usual ones.
    """
    measured = Settings(texts=(*TEXTS, (CHAT, 0)), divergence=True, **settings)
    return Bench(Texts(data.expanduser()), Store(keep.expanduser()), measured, keep_models=keep_models)


def increases(result: Result, dense: Result) -> dict[str, float]:
    """Increase of log-perplexity over the dense model by text, and the mean of the prose; mean KL divergence there."""
    values = {
        name: math.log(value / base)
        for name in (*PROSE, CHAT)
        if (value := result.value(name)) and (base := dense.value(name))
    }
    if all(name in values for name in PROSE):
        values["mean"] = statistics.fmean(values[name] for name in PROSE)
    divergences = [value for name in PROSE if (value := result.value(f"{KL}{name}"))]
    if len(divergences) == len(PROSE):
        values[MEAN_KL] = statistics.fmean(divergences)
    return values


def cells(values: Mapping[str, float], beside: Mapping[str, float]) -> str:
    """The cells of a row; in brackets the multiples of the values beside it, where there are any."""
    texts = []
    for name in COLUMNS:
        text = f"{values[name]:{'' if name == MEAN_KL else '+'}.3f}" if name in values else ""
        texts.append(text + (f" ({values[name] / beside[name]:.2f})" if text and name in beside else ""))
    return " | ".join(texts)


def protocol(settings: Settings) -> str:
    """The measuring in words."""
    return (
        f"Increase of log-perplexity over the dense model at window 512, {settings.max_tokens:,} tokens a text, "
        f"forward passes in {settings.dtype}; *mean* is that of the three texts, *chat* are 160 answers of Alpaca in "
        "the chat template; *KL* is the mean divergence from the dense model on the three texts, in nats per token."
    )


def write(out: Path, page: Sequence[str], results: Sequence[tuple[Row, Result]]) -> None:
    """Write a page, and a JSON file of all that is known of its rows."""
    out.with_suffix(".md").write_text("\n".join(page), encoding="utf-8")
    known = [{"row": asdict(row), **asdict(result)} for row, result in results if result.measures]
    out.with_suffix(".json").write_text(json.dumps({"rows": known}, indent=1) + "\n", encoding="utf-8")
