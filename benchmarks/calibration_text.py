"""What the calibration text does: the table in benchmarks/results/calibration-text.md.

    python benchmarks/calibration_text.py --data data --keep runs/text --out benchmarks/results/calibration-text
    python benchmarks/calibration_text.py ... --ratios 0.2 --models smollm2 --sources c4,auto --num-samples 64

Every model is pruned by the default on the same number of tokens of every source, and the increase of log-perplexity
over the dense model is measured on held-out text of several kinds and on answers in the chat template. Finished rows
are kept as those of `benchmarks/quality.py` are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from quality import chosen, exit_if_any, work
from quality_table.increases import (
    COLUMNS,
    HEADINGS,
    DataFolder,
    ForwardDtype,
    KeepModels,
    Known,
    MaxTokens,
    PagePath,
    RowsFolder,
    bench_of,
    cells,
    increases,
    protocol,
    write,
)
from quality_table.models import MODELS
from quality_table.rows import DENSE, Result, Row
from quality_table.run import Settings
from quality_table.texts import SOURCES
from rich.console import Console
from rich.markdown import Markdown
from transformers.utils import logging

from slimgpt.errors import SlimGPTError

console = Console()


def rows_of(models: Sequence[str], ratios: Sequence[float], sources: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """Dense models, and every source at every ratio and seed."""
    rows = [Row(model, DENSE, 0.0) for model in models]
    for model in models:
        for ratio in ratios:
            for source in sources:
                for seed in seeds:
                    rows.append(Row(model, "slimgpt", ratio, changes=changes(source, seed)))
    return rows


def changes(source: str, seed: int) -> tuple[tuple[str, Any], ...]:
    """What differs from the settings of a run; none for C4 and seed 0, so that the row is that of other tables."""
    values, usual = {"source": source, "seed": seed}, Settings()
    return tuple((name, value) for name, value in values.items() if value != getattr(usual, name))


def table(rows: Sequence[tuple[Row, Result]], models: Sequence[str]) -> Iterator[str]:
    """Markdown: for every model the increases by ratio, source and seed; in brackets the multiple of C4's."""
    for model in models:
        dense = next(result for row, result in rows if row.model == model and row.method == DENSE)
        yield f"## {MODELS[model].title}\n"
        yield f"| removed | calibrated on | seed | {HEADINGS} |"
        yield "|" + "---|" * (3 + len(COLUMNS))
        known = {
            (row.ratio, *map(result.settings["calibration"].get, ("source", "seed"))): increases(result, dense)
            for row, result in rows
            if row.model == model and row.method != DENSE and result.measures
        }
        for (ratio, source, seed), values in known.items():
            beside = known.get((ratio, "c4", seed), {}) if source != "c4" else {}
            yield f"| {ratio:.0%} | {source} | {seed} | {cells(values, beside)} |"
        yield ""


def main(
    data: DataFolder = Path("data"),
    keep: RowsFolder = Path("runs/calibration-text"),
    out: PagePath = None,
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "smollm2,smollm2-mha",
    sources: Annotated[str, typer.Option(help=f"Of {', '.join(SOURCES)}.")] = "c4,speeches,auto,mix",
    ratios: str = "0.2,0.33,0.5",
    seeds: str = "0",
    num_samples: int = 128,
    seq_len: int = 512,
    max_tokens: MaxTokens = 16_384,
    dtype: ForwardDtype = "float32",
    keep_models: KeepModels = False,
    known: Known = False,
) -> None:
    """Measure what is missing, then show and write all that is known."""
    logging.disable_progress_bar()
    try:
        wanted = chosen(models, MODELS, "model")
        bench = bench_of(
            data, keep, keep_models, num_samples=num_samples, seq_len=seq_len, max_tokens=max_tokens, dtype=dtype
        )
        shares, numbers = [float(ratio) for ratio in ratios.split(",")], [int(seed) for seed in seeds.split(",")]
        rows = rows_of(wanted, shares, chosen(sources, SOURCES, "source"), numbers)
        todo = [] if known else [row for row in rows if bench.missing(row)]
    except SlimGPTError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    failed = work(bench, todo, {})
    results = [(row, bench.result(row)) for row in rows]
    lines = list(table(results, wanted))
    console.print(Markdown("\n".join(lines)))
    if out is not None:
        page = [
            "# Calibration text",
            "",
            f"Pruned by the default on {num_samples} x {seq_len} tokens. {protocol(bench.settings)} In brackets: the "
            "multiple of C4's at the same size and seed.",
            "",
            "Written by `benchmarks/calibration_text.py`.",
            "",
            *lines,
        ]
        write(out, page, results)
    exit_if_any(failed)


if __name__ == "__main__":
    typer.run(main)
