"""``slimgpt prune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from slimgpt.cli.console import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    TrustOption,
    app,
    friendly,
    layer_progress,
    out,
    quiet,
)
from slimgpt.config import PruneConfig

if TYPE_CHECKING:
    from slimgpt.planning import Plan
    from slimgpt.pruning import Placement, PruneReport

DEFAULTS = PruneConfig()
WHERE = {"host": "in host memory", "file": "in a file", "recompute": "computed twice"}


@app.command()
@friendly
def prune(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    ratio: Annotated[
        float | None, typer.Option(help="Share of the decoder layers' parameters to remove.", show_default="0.2")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="log_increase, linear_increase, uniform, log_decrease, linear_decrease, or a ratio per layer: a,b,c.",
            show_default="log_increase",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="slimgpt, paper, magnitude, wanda or random.")] = DEFAULTS.method,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="SOURCE", help="A .txt, .jsonl or .parquet file, a folder of these, a datasets id, or 'demo'."
        ),
    ] = "demo",
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = DEFAULTS.num_samples,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = DEFAULTS.seq_len,
    damping: Annotated[
        float, typer.Option(help="Share of the mean diagonal added to the Hessian's diagonal.")
    ] = DEFAULTS.damping,
    seed: Annotated[int, typer.Option(help="For the choice of text.")] = DEFAULTS.seed,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    round_to: Annotated[int, typer.Option(help="FFN widths become multiples of it.")] = DEFAULTS.round_to,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same widths in all layers: loads as a stock class.")
    ] = False,
    head_unit: Annotated[
        str, typer.Option(help="kv: KV heads with their query heads; query: query heads, equally many per KV head.")
    ] = DEFAULTS.head_unit,
    repair: Annotated[
        bool | None,
        typer.Option("--repair/--no-repair", help="Solve for the weights that stay.", show_default="as the method"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows that go through a layer together.")] = DEFAULTS.batch_size,
    forward_dtype: Annotated[
        str,
        typer.Option(
            help="Type of the passes over calibration tokens: auto (as stored; on a CPU the faster one), float32, "
            "float16, bfloat16."
        ),
    ] = DEFAULTS.forward_dtype,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory to use, such as 8GB: of the GPU, or of this process.", show_default="what is free"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed run of the same command stopped.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune MODEL and save the smaller model as the folder OUT."""
    from slimgpt.api import make_config
    from slimgpt.checkpoint import weight_bytes
    from slimgpt.folders import prepare, run_to_folder

    quiet()
    config = make_config(
        ratio=ratio,
        schedule=schedule,
        method=method,
        repair=repair,
        head_unit=head_unit,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        damping=damping,
        seed=seed,
        round_to=round_to,
        uniform=uniform,
        forward_dtype=forward_dtype,
    )
    with out.status("checking the request and reading the text"):
        prepared = prepare(
            model, output, config, calibration, device, dtype, trust_remote_code, overwrite, resume, memory
        )
    _print_plan(prepared.plan)
    widest = max(layer.sizes["intermediate_size"] for layer in prepared.shape.layers)
    if prepared.windows.numel() < 2 * widest:
        out.print(
            f"[yellow]note:[/] {prepared.windows.numel():,} calibration tokens are few for matrices of {widest:,} "
            "columns: the repair fits them and not the text behind them; raise --num-samples or --seq-len",
            soft_wrap=True,
        )
    with layer_progress(prepared.windows.numel(), prepared.device) as on_layer:
        report = run_to_folder(prepared, on_layer, _print_start)
    _print_report(report, weight_bytes(prepared.output), prepared.output)


def _print_start(placement: Placement, finished: int) -> None:
    if finished:
        out.print(f"{finished} layers are finished already; the text goes through them once more")
    places = {"hidden states": placement.stream, "inputs of output matrices": placement.kept}
    where = "; ".join(f"{name}: {WHERE[place]}" for name, place in places.items() if place != "device")
    if placement.gram != "device":
        where += "; Gram matrices: in a file"
    if where:
        out.print(f"memory budget {placement.budget / 1e9:.2f} GB: {where.removeprefix('; ')}", soft_wrap=True)


def _print_plan(plan: Plan) -> None:
    out.print(
        f"plan: remove {plan.achieved:.2%} of the decoder layers (asked: {plan.ratio:.2%}), "
        f"{plan.parameters_before:,} -> {plan.parameters:,} parameters",
        soft_wrap=True,
    )
    from slimgpt.planning import TOLERANCE

    if abs(plan.achieved - plan.ratio) > TOLERANCE:
        out.print("[yellow]note:[/] the units of this request allow no nearer share; a smaller --round-to does")


def _print_report(report: PruneReport, size: int, folder: Path) -> None:
    plan = report.plan
    table = Table(title=f"{report.base_model}, method {report.settings.method}", title_justify="left")
    for column in ("layer", "heads", "KV heads", "FFN channels", "removed", "error attention", "error FFN", "seconds"):
        table.add_column(column, justify="right")
    for layer in report.layers:
        s = layer.sizes
        table.add_row(
            str(layer.layer),
            str(s["num_attention_heads"]),
            str(s["num_key_value_heads"]),
            str(s["intermediate_size"]),
            f"{1 - layer.parameters / layer.parameters_before:.1%}",
            f"{layer.error['heads']:.2%}",
            f"{layer.error['channels']:.2%}",
            f"{sum(layer.seconds.values()):.1f}",
        )
    out.print(table)
    out.print(
        f"removed {plan.achieved:.2%} of the decoder layers (asked: {plan.ratio:.2%}) in {report.seconds:.1f} s\n"
        f"{plan.parameters_before:,} -> {plan.parameters:,} parameters, {size:,} bytes of weights\n"
        f"saved {folder} (report: slimgpt.json, plot: widths.png, card: README.md)",
        soft_wrap=True,
        highlight=False,
    )
