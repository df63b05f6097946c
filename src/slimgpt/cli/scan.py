"""``slimgpt scan``."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from slimgpt.cli.console import (
    app,
    check_folder,
    check_json,
    handle_errors,
    out,
    show,
    silence_libraries,
    write_json,
)
from slimgpt.cli.options import DeviceOption, DtypeOption, ModelArgument, TrustOption, help_panels, setting_options
from slimgpt.cli.progress import phase_progress
from slimgpt.cli.prune import for_engines
from slimgpt.config import PruneConfig
from slimgpt.errors import OutputError, UsageError
from slimgpt.io.atomic import write_file
from slimgpt.runtime.setting_checks import check_ratio

if TYPE_CHECKING:
    from slimgpt.scanning.report import ScanReport

EXAMPLES = """Examples:

slimgpt scan HuggingFaceTB/SmolLM2-1.7B

slimgpt scan MODEL --calibration my.jsonl --max-kl 0.15 --num-samples 64 --seq-len 512
"""


@app.command(epilog=EXAMPLES)
@handle_errors
@help_panels(
    {
        "Sizes": "points max_kl engines uniform num_widths round_to",
        "Calibration": "calibration num_samples seq_len seed",
        "Method": "method allocation schedule head_unit whole_experts ffn_only heads_only skip_layers repair damping",
        "Training": "distill",
        "Resources": "device dtype forward_dtype batch_size memory",
        "Output": "output overwrite",
    }
)
@setting_options(PruneConfig, "scan", before={"device": "num_samples seq_len seed", "memory": ""})
def scan(
    model: ModelArgument,
    *,
    points: Annotated[
        str | None,
        typer.Option(
            metavar="RATIOS",
            help="Ratios to prune to and measure; others are predicted.",
            show_default="0.1,0.3,0.55",
        ),
    ] = None,
    max_kl: Annotated[
        float, typer.Option(metavar="NATS", help="The largest KL divergence per token to recommend.")
    ] = 0.25,
    engines: Annotated[
        str | None, typer.Option("--for", help="Engines to serve it in: hf, vllm, llama.cpp, sglang, mlx, onnx.")
    ] = None,
    output: Annotated[Path, typer.Option("--out", metavar="OUT", help="The folder to write.")] = Path("slimgpt-scan"),
    calibration: Annotated[
        str, typer.Option(metavar="SOURCE", help="auto: text that the model writes; or as for `slimgpt prune`.")
    ] = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory limit of the GPU or this process, such as 8GB.", show_default="what is free"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier scan in OUT.")] = False,
    trust_remote_code: TrustOption = False,
    **settings: Any,
) -> None:
    """How much can be removed from MODEL: what 5 to 60% cost and gain, and the largest size that loses little enough.

    A few sizes are pruned in memory and measured, the others predicted from these. No model is written."""
    table, plot = output / "scan.json", output / "scan.png"
    check_folder(output)
    for file in (table, plot) if output.is_dir() else ():
        check_json(file, overwrite, "--out")
    ratios = None if points is None else parse_ratios(points)
    for_engines(engines, settings)
    from slimgpt.scanning.run import scan as run
    from slimgpt.scanning.run import scan_config

    config = scan_config(ratios, max_kl, settings)
    silence_libraries()
    from slimgpt.runtime.devices import as_device

    with phase_progress(config.num_samples * config.seq_len, as_device(device)) as step:
        report = run(
            model,
            None,
            calibration,
            points=ratios,
            max_kl=max_kl,
            device=device,
            dtype=dtype,
            memory=memory,
            trust_remote_code=trust_remote_code,
            on_phase=step,
            **settings,
        )
    print_scan(report)  # before anything is written: hours are not lost with a full disk
    picture = io.BytesIO()
    report.plot().savefig(picture, format="png", dpi=120)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"making {output} failed: {error}; give another --out") from error
    write_file(plot, picture.getvalue())
    write_json(table, report.to_json())
    best = report.recommended
    if best is not None:
        out.print(
            f"next: slimgpt prune {show(shlex.quote(model))} OUT --ratio {best.ratio:g}   # and the same options",
            soft_wrap=True,
            highlight=False,
        )
    out.print(f"table: {show(table)}\nplot:  {show(plot)}", soft_wrap=True, highlight=False)


def parse_ratios(text: str) -> list[float]:
    """Ratios from the command line, such as ``0.1,0.3,0.55``.

    Raises:
        UsageError: something in it is no share.
    """
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--points '{text}' is no list of ratios such as 0.1,0.3,0.55") from None
    for ratio in ratios:
        check_ratio("--points: ratio", ratio)
    return ratios


def print_scan(report: ScanReport) -> None:
    """A row for every size, and the recommendation; 80 columns are enough."""
    from slimgpt.calibration.evaluation_text import FOR_PEOPLE
    from slimgpt.scanning.report import MARKED

    header, *rows = report.rows()
    table = Table(title=f"{show(report.base_model)}, {FOR_PEOPLE[report.text]}", title_justify="left")
    for column in header:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print(MARKED, highlight=False)
    if report.omitted:
        sizes = ", ".join(f"{float(ratio):.0%}" for ratio in report.omitted)
        reason = next(iter(report.omitted.values()))
        out.print(f"[yellow]note:[/] left out: {sizes}; {show(reason)}", soft_wrap=True, highlight=False)
    out.print(f"[bold]{show(report.reason)}[/]", soft_wrap=True, highlight=False)
