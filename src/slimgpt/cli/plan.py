"""``slimgpt plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from slimgpt.cli.console import app, check_json, err, handle_errors, out, show, silence_libraries
from slimgpt.cli.options import ModelArgument, TrustOption, setting_options
from slimgpt.cli.progress import duration
from slimgpt.cli.prune import for_engines
from slimgpt.config import PruneConfig, make_config
from slimgpt.errors import PlanError
from slimgpt.io.atomic import write_file

if TYPE_CHECKING:
    from slimgpt.pipeline.estimate import Estimate


@app.command()
@handle_errors
@setting_options(
    PruneConfig,
    "plan",
    before={
        "engines": "ratio params bytes kv_cache speedup on batch prompt new_tokens speed_table",
        "dtype": "schedule method head_unit round_to uniform num_widths whole_experts",
        "save": "num_samples seq_len",
    },
)
def plan(
    model: ModelArgument,
    engines: Annotated[
        str | None, typer.Option("--for", help="Engines to serve it in: hf, vllm, llama.cpp, sglang, mlx, onnx.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the saved weights.")] = "auto",
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the widths as TOML for prune --plan.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the TOML file.")] = False,
    trust_remote_code: TrustOption = False,
    **settings: Any,
) -> None:
    """Show widths, size, cost and engines of a pruned MODEL before any weight is loaded."""
    check_json(save, overwrite, "--save")
    names = for_engines(engines, settings)  # before torch is imported: what is wrong in it is said at once
    config = make_config(**settings)
    from slimgpt.pipeline.estimate import forecast
    from slimgpt.planning.plan_file import to_toml

    silence_libraries()
    with err.status("reading the config") as status:
        estimate = forecast(
            model,
            config,
            dtype,
            names,
            trust_remote_code,
            on_timed=lambda number, total, _seconds: status.update(f"timing layers: {number + 1} of {total}"),
        )
    if save is not None:
        write_file(save, to_toml(estimate.plan, estimate.model_type))
    if as_json:
        typer.echo(json.dumps(estimate.to_json()))
    else:
        _print(estimate)
        for line in (line for verdict in estimate.verdicts if names is not None for line in verdict.releases):
            out.print(line, soft_wrap=True, highlight=False)
    if save is not None and not as_json:
        out.print(
            f"saved {show(save)}: `slimgpt prune {show(model)} OUT --plan {show(save)}` follows it",
            soft_wrap=True,
            highlight=False,
        )
    refused = [verdict for verdict in estimate.verdicts if names is not None and not verdict.runs]
    for verdict in refused[:1]:  # asked for by name
        raise PlanError(f"{verdict.engine} does not run it: {verdict.how}; {verdict.change or 'leave it out of --for'}")


def _print(estimate: Estimate) -> None:
    plan = estimate.plan
    table = Table(title=f"{estimate.model} ({estimate.model_type})", title_justify="left")
    for column in ("layers", "heads", "KV heads", "FFN channels"):
        table.add_column(column, justify="right")
    from slimgpt.models.families.moe import ffn_text

    for first, last, sizes in estimate.runs():
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            str(sizes["num_attention_heads"]),
            str(sizes["num_key_value_heads"]),
            ffn_text(sizes),
        )
    out.print(table)
    out.print(
        f"parameters     {plan.parameters_before:,} -> {plan.parameters:,} ({plan.achieved:.2%} of the layers go)",
        soft_wrap=True,
    )
    if estimate.widths is not None:
        out.print(f"widths         {estimate.widths}", soft_wrap=True, highlight=False)
    if (speed := estimate.speed) is not None:
        out.print(
            f"speed          {speed['asked']:g} times as fast asked, {speed['promised']:.2f} promised "
            f"({speed['engine']}, batch {speed['batch']}, {speed['prompt']} + {speed['new_tokens']} tokens)",
            soft_wrap=True,
            highlight=False,
        )
        if "note" in speed:
            out.print(f"[yellow]note:[/]          {speed['note']}", soft_wrap=True, highlight=False)
    if estimate.note is not None:
        out.print(f"[yellow]note:[/]          {estimate.note}", soft_wrap=True)
    if estimate.experts is not None:
        out.print(f"[yellow]note:[/]          {estimate.experts}", soft_wrap=True)
    sizes = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in estimate.bytes.items())
    out.print(f"GB on disk     {sizes}", soft_wrap=True)
    if estimate.quantization is not None:
        out.print(f"quantised      {estimate.quantization['format']}; read as {estimate.quantization['read_as']}")
    quants = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in estimate.gguf_bytes.items())
    out.print(f"GB as GGUF     about {quants}", soft_wrap=True)
    out.print(
        f"KV cache       {estimate.kv_before:,} -> {estimate.kv_after:,} bytes per token (16 bits, full attention)\n"
        f"FLOPs/token    {estimate.flops_before / 1e9:.2f} -> {estimate.flops_after / 1e9:.2f} billion\n"
        f"pruning here   about {estimate.memory / 1e9:.1f} GB beside the mapped weights and "
        f"{duration(estimate.seconds)} on {estimate.device}, for {estimate.tokens:,} tokens",
        soft_wrap=True,
    )
    engines = Table(title="engines", title_justify="left")
    for column in ("engine", "runs", "how", "or ask for"):
        engines.add_column(column)
    for verdict in estimate.verdicts:
        engines.add_row(verdict.engine, "yes" if verdict.runs else "no", verdict.how, verdict.change)
    out.print(engines)
