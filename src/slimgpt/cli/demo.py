"""``slimgpt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from slimgpt import assets
from slimgpt.cli.console import app, handle_errors, out, show, silence_libraries
from slimgpt.cli.divergence import print_dense_comparison
from slimgpt.cli.progress import phase_progress

if TYPE_CHECKING:
    from slimgpt.pipeline.demo import DemoResult


@app.command()
@handle_errors
def demo(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")] = Path("slimgpt-demo"),
    ratio: Annotated[float, typer.Option(help="Share of the decoder layers' parameters to remove.")] = 0.2,
    num_samples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """Prune SmolLM2-135M-Instruct and show it before and after. Needs no hub and no data."""
    from slimgpt.io.folders import check_output
    from slimgpt.pipeline.callbacks import by_phase
    from slimgpt.pipeline.demo import run_demo

    silence_libraries()
    for part in ("slim", "dense"):
        check_output(output / part, overwrite)
    from slimgpt.runtime.devices import as_device

    with phase_progress(num_samples * seq_len, as_device("auto")) as step:
        result = run_demo(
            output,
            ratio,
            num_samples,
            seq_len,
            overwrite,
            lambda text: out.print(f"[dim]{show(text)}[/]"),
            by_phase(step),
            on_phase=step,
        )
    _print_demo(result)


def _print_demo(result: DemoResult) -> None:
    dense, slim = result.dense, result.slim
    print_dense_comparison(result.report.divergence)
    table = Table(title=assets.MODEL_NAME, title_justify="left")
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="left" if not column else "right")
    rows: list[tuple[str, float, float, str]] = [
        ("parameters", dense.parameters, slim.parameters, ",.0f"),
        ("bytes on disk", dense.bytes, slim.bytes, ",.0f"),
        ("perplexity on held-out speeches, window 512", dense.perplexity, slim.perplexity, ".2f"),
        ("prefill, tokens per second", dense.prefill_tokens_per_second, slim.prefill_tokens_per_second, ",.0f"),
        ("decode, tokens per second", dense.decode_tokens_per_second, slim.decode_tokens_per_second, ",.1f"),
        ("peak memory of a process that generates, MB", dense.peak_memory / 1e6, slim.peak_memory / 1e6, ",.0f"),
    ]
    for name, before, after, style in rows:
        table.add_row(name, format(before, style), format(after, style), f"{after / before:.3f}")
    out.print(table)
    from slimgpt.pipeline.demo import PROMPT

    for name, sample in (("before", dense.sample), ("after", slim.sample)):
        out.print(f"[bold]{name}:[/] [dim]{PROMPT}[/]{escape(sample.removeprefix(PROMPT))}\n", highlight=False)
    out.print(
        f"\npruning took {result.report.seconds:.0f} s\n"
        f"plot:   {result.folder / 'widths.png'}\ntable:  {result.folder.parent / 'demo.json'}\n"
        f"folder: {result.folder}",
        soft_wrap=True,
        highlight=False,
    )
