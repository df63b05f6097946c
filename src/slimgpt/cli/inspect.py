"""``slimgpt inspect``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from slimgpt.cli.console import app, handle_errors, out, silence_libraries
from slimgpt.cli.options import ModelArgument, TrustOption


@app.command()
@handle_errors
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show widths per layer, parameters, bytes and what was removed, without loading weights."""
    from slimgpt.checkpoint.inspecting import inspect as run

    silence_libraries()
    summary = run(model, trust_remote_code)
    if as_json:
        typer.echo(json.dumps(summary.to_json()))
        return
    plan = (summary.pruned or {}).get("plan")
    base = (summary.pruned or {}).get("base_model")
    before = [layer["parameters_before"] for layer in summary.pruned["layers"]] if summary.pruned else None
    table = Table(title=f"{summary.model} ({summary.model_type})", title_justify="left")
    for column in ("layer", "heads", "KV heads", "FFN channels", "parameters", *(["removed"] if before else [])):
        table.add_column(column, justify="right")
    from slimgpt.models.families.moe import ffn_text

    for index, layer in enumerate(summary.layers):
        row = [
            str(index),
            str(layer.sizes["num_attention_heads"]),
            str(layer.sizes["num_key_value_heads"]),
            ffn_text(layer.sizes),
            f"{layer.parameters:,}",
        ]
        table.add_row(*row, *([f"{1 - layer.parameters / before[index]:.1%}"] if before else []))
    out.print(table)
    out.print(f"parameters     {summary.parameters:,}, of which {summary.layer_parameters:,} in the decoder layers")
    if summary.bytes is not None:
        out.print(f"bytes on disk  {summary.bytes:,}")
    if summary.quantization is not None:
        out.print(f"quantised      {summary.quantization['format']}; read as {summary.quantization['read_as']}")
    out.print(f"layers         {'all of the same widths' if summary.uniform else 'of different widths'}")
    if plan:
        out.print(
            f"pruned         {plan['achieved']:.2%} of the decoder layers of {base}, which had "
            f"{plan['parameters_before']:,} parameters",
            soft_wrap=True,
        )
