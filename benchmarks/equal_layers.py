"""What equal layers cost beside widths by layer, at equal size: the table in benchmarks/results/equal-layers.md.

    python benchmarks/equal_layers.py --data data --keep runs/text --out benchmarks/results/equal-layers
    python benchmarks/equal_layers.py ... --rows smollm2:0.2,smollm2-mha:0.33 --num-samples 64

Every model is pruned on the same windows of C4 by the default and with `--uniform`, and the increase of log-perplexity
over the dense model is measured on held-out text of several kinds and on answers in the chat template. Finished rows
are kept as those of `benchmarks/calibration_text.py` are, whose rows of C4 serve here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from quality import chosen, exit_if_any, work
from quality_table.increases import COLUMNS, HEADINGS, bench_of, cells, increases, protocol, write
from quality_table.models import MODELS
from quality_table.rows import DENSE, Result, Row
from rich.console import Console
from rich.markdown import Markdown
from transformers.utils import logging

from slimgpt.errors import SlimGPTError
from slimgpt.runtime.versions import versions

BY_LAYER, EQUAL = "slimgpt", "slimgpt-uniform"
TITLES = {BY_LAYER: "by layer", EQUAL: "equal", "slimgpt-4-widths": "four at most"}

GOAL = 1.10
"""The multiple of the increase of widths by layer that equal layers may cost."""

console = Console()


def table(rows: Sequence[tuple[Row, Result]]) -> Iterator[str]:
    """Markdown: increases by model, ratio and widths; in brackets the multiple of the increase by layer."""
    yield f"| model | widths | removed | {HEADINGS} | pruning, core-seconds |"
    yield "|" + "---|" * (4 + len(COLUMNS))
    dense = {row.model: result for row, result in rows if row.method == DENSE}
    known = {
        (row.model, row.ratio, row.method): (increases(result, dense[row.model]), result)
        for row, result in rows
        if row.method != DENSE and result.measures
    }
    for (model, ratio, method), (values, result) in known.items():
        beside = known.get((model, ratio, BY_LAYER), ({}, result))[0] if method != BY_LAYER else {}
        yield (
            f"| {model} | {TITLES[method]} | {result.found['achieved']:.2%} | {cells(values, beside)} "
            f"| {result.found['core_seconds'] or 0:.0f} |"
        )


def main(
    data: Annotated[Path, typer.Option(help="Folder of texts, as benchmarks/quality.py has it.")] = Path("data"),
    keep: Annotated[Path, typer.Option(help="Folder of finished rows.")] = Path("runs/calibration-text"),
    out: Annotated[Path | None, typer.Option(help="Write page and JSON there; without a suffix.")] = None,
    rows: Annotated[
        str, typer.Option(help=f"MODEL:RATIO with commas; models are {', '.join(MODELS)}.")
    ] = "smollm2:0.2,smollm2:0.33,smollm2:0.5,smollm2-mha:0.2,smollm2-mha:0.33,smollm2-mha:0.5",
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(TITLES)}.")] = f"{BY_LAYER},{EQUAL}",
    num_samples: int = 128,
    seq_len: int = 512,
    max_tokens: Annotated[int, typer.Option(help="Of each held-out text.")] = 16_384,
    dtype: Annotated[str, typer.Option(help="Of forward passes: float32, or bfloat16 where it is faster.")] = "float32",
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the slim models beside the rows.")] = False,
) -> None:
    """Measure what is missing, then show and write all that is known."""
    logging.disable_progress_bar()
    try:
        pairs = [pair.partition(":")[::2] for pair in rows.split(",")]
        models = chosen(",".join(dict.fromkeys(model for model, _ in pairs)), MODELS, "model")
        widths = chosen(methods, TITLES, "method")
        bench = bench_of(
            data, keep, keep_models, num_samples=num_samples, seq_len=seq_len, max_tokens=max_tokens, dtype=dtype
        )
        wanted = [Row(model, DENSE, 0.0) for model in models]
        wanted += [Row(model, method, float(ratio)) for model, ratio in pairs for method in widths]
        todo = [row for row in wanted if bench.missing(row)]
    except SlimGPTError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    failed = work(bench, todo, {})
    results = [(row, bench.result(row)) for row in wanted]
    lines = list(table(results))
    console.print(Markdown("\n".join(lines)))
    if out is not None:
        page = [
            "# Equal layers beside widths by layer",
            "",
            f"Pruned by the default, by layer and with `--uniform`, on the same {num_samples} x {seq_len} tokens of "
            "C4 (seed 0); with `--uniform` the default trains on up to twice as much of them. "
            f"{protocol(bench.settings)} In brackets: the multiple of the row by layer (goal: {GOAL:.2f} in "
            "the mean). One run each.",
            "",
            *lines,
            "",
            "Written by `benchmarks/equal_layers.py` with "
            + ", ".join(f"{name} {version}" for name, version in versions(bench.device).items())
            + ".",
            "",
        ]
        write(out, page, results)
    exit_if_any(failed)


if __name__ == "__main__":
    typer.run(main)
