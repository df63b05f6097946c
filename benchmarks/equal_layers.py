"""What equal layers cost beside widths by layer, at equal size: the table in benchmarks/results/equal-layers.md.

    python benchmarks/equal_layers.py --data data --keep runs/text --out benchmarks/results/equal-layers
    python benchmarks/equal_layers.py ... --rows smollm2:0.2,smollm2-mha:0.33 --num-samples 64

Every model is pruned on the same windows of C4 by the default and with `--uniform`, and the increase of log-perplexity
over the dense model is measured on held-out text of several kinds and on answers in the chat template. Finished rows
are kept as those of `benchmarks/calibration_text.py` are, whose rows of C4 serve here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

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
    yield f"| model | widths | removed | {HEADINGS} | mean at equal size | pruning, core-seconds |"
    yield "|" + "---|" * (5 + len(COLUMNS))
    dense = {row.model: result for row, result in rows if row.method == DENSE}
    known = {
        (row.model, row.ratio, row.method): (increases(result, dense[row.model]), result)
        for row, result in rows
        if row.method != DENSE and result.measures
    }
    for (model, ratio, method), (values, result) in known.items():
        removed, multiple, beside = result.found["achieved"], "", {}
        if method != BY_LAYER:
            beside = known.get((model, ratio, BY_LAYER), ({}, result))[0]
            by_layer = {
                each.found["achieved"]: increase["mean"]
                for (other, _, way), (increase, each) in known.items()
                if other == model and way == BY_LAYER
            }
            at_size = interpolated(by_layer, removed)
            multiple = f"{values['mean'] / at_size:.2f}" if at_size else ""
        yield (
            f"| {model} | {TITLES[method]} | {removed:.2%} | {cells(values, beside)} | {multiple} "
            f"| {result.found['core_seconds'] or 0:.0f} |"
        )


def interpolated(values: Mapping[float, float], at: float) -> float | None:
    """An increase at a share removed that was not measured: its logarithm is taken as linear between the two nearest.

    Args:
        values: increases by the share removed.

    Returns:
        ``None`` with fewer than two values.
    """
    if len(values) < 2:
        return None
    (x0, y0), (x1, y1) = sorted(sorted(values.items(), key=lambda pair: abs(pair[0] - at))[:2])
    return y0 * (y1 / y0) ** ((at - x0) / (x1 - x0))


def main(
    data: DataFolder = Path("data"),
    keep: RowsFolder = Path("runs/calibration-text"),
    out: PagePath = None,
    rows: Annotated[
        str, typer.Option(help=f"MODEL:RATIO with commas; models are {', '.join(MODELS)}.")
    ] = "smollm2:0.2,smollm2:0.33,smollm2:0.5,smollm2-mha:0.2,smollm2-mha:0.33,smollm2-mha:0.5",
    methods: Annotated[str, typer.Option(help=f"Of {', '.join(TITLES)}.")] = f"{BY_LAYER},{EQUAL}",
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
        pairs = [pair.partition(":")[::2] for pair in rows.split(",")]
        models = chosen(",".join(dict.fromkeys(model for model, _ in pairs)), MODELS, "model")
        widths = chosen(methods, TITLES, "method")
        bench = bench_of(
            data, keep, keep_models, num_samples=num_samples, seq_len=seq_len, max_tokens=max_tokens, dtype=dtype
        )
        wanted = [Row(model, DENSE, 0.0) for model in models]
        wanted += [Row(model, method, float(ratio)) for model, ratio in pairs for method in widths]
        todo = [] if known else [row for row in wanted if bench.missing(row)]
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
            "the mean); *at equal size* of the increase by layer with as much removed, whose logarithm is interpolated "
            "between the rows. One run each.",
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
