"""``slimgpt speed``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slimgpt.cli.console import app, check_json, handle_errors, out, silence_libraries, write_json
from slimgpt.cli.evaluate import whole_numbers
from slimgpt.cli.options import DeviceOption, DtypeOption, ModelArgument, TrustOption
from slimgpt.cli.progress import bar

if TYPE_CHECKING:
    from slimgpt.comparison.timing import Timings

BatchOption = Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")]
PromptOption = Annotated[int, typer.Option(help="Tokens per prompt.")]
NewOption = Annotated[int, typer.Option(help="New tokens per prompt.")]
RoundsOption = Annotated[int, typer.Option(help="Timed rounds; the median is reported.")]


@app.command()
@handle_errors
def speed(
    model: ModelArgument,
    *,
    against: Annotated[str | None, typer.Option(metavar="BASE", help="Time BASE as well, in turn with MODEL.")] = None,
    batch: BatchOption = "1",
    prompt: PromptOption = 512,
    new_tokens: NewOption = 128,
    rounds: RoundsOption = 5,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak memory in a fresh process per model.")
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the JSON file.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure the speed, peak memory, bytes and FLOPs of MODEL."""
    check_json(json_file, overwrite)
    batches = whole_numbers(batch, "--batch")
    from slimgpt.comparison.timing import speed as run

    silence_libraries()
    with bar("timing") as step:
        timings = run(
            model,
            against,
            batches=batches,
            prompt=prompt,
            new_tokens=new_tokens,
            rounds=rounds,
            memory=memory,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            progress=step,
        )
    write_json(json_file, timings.to_json())
    print_timings(timings)


def print_timings(timings: Timings) -> None:
    """A column per model and a table per batch size, then the ratios to the base."""
    from slimgpt.comparison.timing import METRIC_FORMATS, same_type

    for batch in dict.fromkeys(row.batch for row in timings.rows):
        rows = [row for row in timings.rows if row.batch == batch]
        table = Table(f"batch {batch}", title_justify="left")
        for row in rows:
            table.add_column(Path(row.model).name, justify="right", overflow="fold")
        table.add_row("parameters", *(f"{row.parameters:,}" for row in rows))
        table.add_row("MB on disk", *(f"{row.bytes / 1e6:,.1f}" for row in rows))
        for name, figure in METRIC_FORMATS.items():
            values = [getattr(row, name) for row in rows]
            table.add_row(figure.title, *("-" if v is None else format(v / figure.scale, figure.style) for v in values))
        out.print(table)
    for (model, batch), ratio in timings.ratios().items():
        pair = [row for row in timings.rows if row.batch == batch and row.model in (model, timings.base)]
        size = f"on disk x {ratio['bytes']:.3f}" if same_type(pair) else f"parameters x {ratio['parameters']:.3f}"
        peak = f", peak memory x {ratio['peak_memory']:.3f}" if "peak_memory" in ratio else ""
        out.print(
            f"{Path(model).name} against {Path(str(timings.base)).name}, batch {batch}: "
            f"prefill x [bold]{ratio['prefill']:.2f}[/] (FLOPs promise {ratio['prefill_flops']:.2f}), "
            f"decode x [bold]{ratio['decode']:.2f}[/] (FLOPs promise {ratio['decode_flops']:.2f}, "
            f"bytes read promise {ratio['decode_bytes']:.2f}), {size}{peak}",
            soft_wrap=True,
            highlight=False,
        )
