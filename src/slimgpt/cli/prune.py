"""``slimgpt prune``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from slimgpt.cli.console import app, handle_errors, out, print_uploaded, show, silence_libraries
from slimgpt.cli.divergence import print_dense_comparison, print_next
from slimgpt.cli.options import (
    DeviceOption,
    DtypeOption,
    ModelArgument,
    PrivateOption,
    PushOption,
    TrustOption,
    help_panels,
    setting_options,
)
from slimgpt.cli.progress import duration, layer_progress
from slimgpt.config import PruneConfig, make_config
from slimgpt.runtime.setting_checks import AUTO

if TYPE_CHECKING:
    from slimgpt.pipeline.prepare import PruneRequest
    from slimgpt.pruning.report import PruneReport
    from slimgpt.runtime.memory import Placement

EXAMPLES = """Examples:

slimgpt prune HuggingFaceTB/SmolLM2-1.7B slim --ratio 0.25

slimgpt prune MODEL slim --for vllm --params 6B --calibration my.jsonl

slimgpt prune MODEL slim --method paper --ratio 0.2

Several GPUs: torchrun --nproc-per-node 8 -m slimgpt prune MODEL slim
"""

LONG = 600
"""Seconds from which on a run is worth shortening."""

WHERE = {"host": "in host memory", "file": "in a file", "recompute": "computed twice"}


@app.command(epilog=EXAMPLES)
@handle_errors
@help_panels(
    {
        "Target": "ratio params bytes kv_cache plan engines uniform num_widths round_to",
        "Speed": "speedup on batch prompt new_tokens speed_table",
        "Calibration": "calibration num_samples seq_len seed",
        "Method": "method allocation schedule head_unit whole_experts drop_attention ffn_only heads_only skip_layers "
        "repair damping",
        "Training": "distill",
        "Resources": "device dtype forward_dtype batch_size memory",
        "Output": "export_to push_to_hub private evaluate resume overwrite dry_run verbose",
    }
)
@setting_options(
    PruneConfig,
    "prune",
    before={
        "engines": "ratio params bytes kv_cache plan speedup on batch prompt new_tokens speed_table",
        "calibration": "schedule method allocation",
        "device": "num_samples seq_len damping seed",
        "memory": "round_to uniform num_widths head_unit whole_experts distill repair batch_size forward_dtype",
    },
)
def prune(
    model: ModelArgument,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    *,
    engines: Annotated[
        str | None, typer.Option("--for", help="Engines to serve it in: hf, vllm, llama.cpp, sglang, mlx, onnx.")
    ] = None,
    export_to: Annotated[
        str | None,
        typer.Option("--export", help="Also write OUT-FORMAT: gguf, hf-uniform, padded, nemotron-nas, onnx, openvino."),
    ] = None,
    push_to_hub: PushOption = None,
    private: PrivateOption = False,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="auto: text that the model writes; a .txt, .jsonl or .parquet file, a folder of these, a datasets id, "
            "'demo', 'mix', or several with shares: auto:2,text.jsonl:1.",
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="Memory limit of the GPU or this process, such as 8GB.", show_default="what is free"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume a killed run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    trust_remote_code: TrustOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, plan, estimate; write nothing.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show a row for every layer.")] = False,
    **settings: Any,
) -> None:
    """Prune MODEL and write the smaller model to the folder OUT."""
    for_engines(engines, settings)
    config = make_config(**settings)  # before torch is imported: what is wrong in it is said at once
    from slimgpt.checkpoint.hub import check_repository
    from slimgpt.io.weight_files import weight_bytes
    from slimgpt.pipeline.estimate import run_seconds
    from slimgpt.pipeline.prepare import prepare
    from slimgpt.pipeline.to_folder import run_to_folder
    from slimgpt.runtime.distributed import rank_of_environment

    silence_libraries()
    main = rank_of_environment() == 0
    with out.status("checking the request and reading the text") as status:
        prepared = prepare(
            model,
            output,
            config,
            calibration,
            device,
            dtype,
            trust_remote_code,
            overwrite=overwrite,
            resume=resume,
            memory=memory,
            on_step=lambda phase, number, steps, _seconds: status.update(f"{phase}: {number + 1} of {steps}"),
            keep_table=not dry_run,
        )
    if export_to is not None:
        from slimgpt.exporting.run import check_format, check_target

        check_format(export_to, prepared.model_config, prepared.plan.layers)
        check_target(export_to, export_path(output, export_to), overwrite, prepared.source.folders)
    _print_plan(prepared)
    widest = max(layer.sizes["intermediate_size"] for layer in prepared.shape.layers)
    if prepared.windows.numel() < 2 * widest:
        out.print(
            f"[yellow]note:[/] {prepared.windows.numel():,} calibration tokens are few for matrices of {widest:,} "
            "columns: the repair fits them and not the text behind them; raise --num-samples or --seq-len",
            soft_wrap=True,
        )
    estimated = run_seconds(prepared)
    _print_estimate(prepared, estimated)
    repository = None
    if main:
        repository = check_repository(push_to_hub, private=private, overwrite=overwrite, create=not dry_run)
    if dry_run:
        return
    with layer_progress(prepared.windows.numel(), prepared.device) as callbacks:
        report = run_to_folder(prepared, replace(callbacks, start=_print_start))
    if not main:  # the first process writes the folder, and may still be at it
        return
    _print_report(report, weight_bytes(prepared.output), prepared.output, verbose=verbose, estimated=estimated)
    if export_to is not None:
        from slimgpt.cli.export import export_phases, print_export
        from slimgpt.exporting.run import export

        with export_phases() as export_callbacks:
            written = export(
                prepared.output,
                export_path(prepared.output, export_to),
                export_to,
                overwrite=overwrite,
                **export_callbacks,
            )
        print_export(written)
    if repository is not None:
        print_uploaded(repository.upload(prepared.output))
        if export_to is not None:
            exported = export_path(output, export_to)
            beside = f" {exported.name}" if exported.is_file() else ""
            out.print(f"not uploaded: {show(exported)}. To add it:")
            out.print_commands(f"hf upload {shlex.quote(repository.name)} {shlex.quote(str(exported))}{beside}")
    print_next(model, output)


def for_engines(engines: str | None, settings: dict[str, Any]) -> list[str] | None:
    """The names of engines; the step of FFN widths and equal layers become what they ask for where nothing is said.

    Raises:
        UsageError: a setting is wrong, said before anything heavy is imported.
    """
    make_config(**{**settings, "round_to": AUTO if settings["round_to"] is None else settings["round_to"]})
    names = [name.strip() for name in engines.split(",")] if engines else None
    if names is not None:
        from slimgpt.planning.engines import suit_engines  # imports transformers

        suit_engines(names, settings)
    if settings["round_to"] is None:
        settings["round_to"] = AUTO
    return names


def export_path(output: Path, to: str) -> Path:
    """Path that ``--export`` writes to: beside OUT, with the format's name."""
    return output.with_name(f"{output.name}.gguf" if to == "gguf" else f"{output.name}-{to}")


def _print_start(placement: Placement, finished: int) -> None:
    if finished:
        out.print(f"{finished} layers are finished already; the text goes through them once more")
    places = {"hidden states": placement.stream, "inputs of output matrices": placement.kept}
    where = "; ".join(f"{name}: {WHERE[place]}" for name, place in places.items() if place != "device")
    if placement.gram != "device":
        where += "; Gram matrices: in a file"
    if where:
        out.print(f"memory budget {placement.budget / 1e9:.2f} GB: {where.removeprefix('; ')}", soft_wrap=True)


def _print_estimate(request: PruneRequest, seconds: float) -> None:
    """Print the estimated time, and that with a quarter of the text where it is long."""
    from slimgpt.pipeline.estimate import run_seconds

    windows = len(request.windows)
    about = f"about {duration(seconds)}" if seconds >= 1 else "less than a second"
    fewer = ""
    if seconds > LONG and windows >= 8:
        fewer = f"; --num-samples {windows // 4} takes about {duration(run_seconds(request, windows // 4))}"
    out.print(
        f"{about} on this {'CPU' if request.device.type == 'cpu' else 'GPU'} for {windows} x "
        f"{request.windows.shape[1]} tokens{fewer}",
        soft_wrap=True,
        highlight=False,
    )


def _print_plan(request: PruneRequest) -> None:
    plan, config, shape = request.plan, request.config, request.shape
    asked = f"{plan.ratio:.2%}" if config.speedup is None else f"{config.speedup:g} times as fast"
    out.print(
        f"plan: remove {plan.achieved:.2%} of the decoder layers (asked: {asked}), "
        f"{plan.parameters_before:,} -> {plan.parameters:,} parameters",
        soft_wrap=True,
    )
    from slimgpt.planning.alignment import why_not_nearer

    if (why := why_not_nearer(config, shape, plan)) is not None:
        out.print(f"[yellow]note:[/] {why}", soft_wrap=True)
    if request.speed is not None and request.speed.note is not None:
        out.print(f"[yellow]note:[/] {request.speed.note}", soft_wrap=True, highlight=False)


def _print_layers(report: PruneReport) -> None:
    table = Table(title=f"{report.base_model}, method {report.settings.method}", title_justify="left")
    for column in ("layer", "heads", "KV heads", "FFN channels", "removed", "error attention", "error FFN", "seconds"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))  # 80 columns are enough
    from slimgpt.models.families.moe import ffn_text

    for layer in report.layers:
        s = layer.sizes
        table.add_row(
            str(layer.layer),
            str(s["num_attention_heads"]),
            str(s["num_key_value_heads"]),
            ffn_text(s),
            f"{1 - layer.parameters / layer.parameters_before:.1%}",
            layer.percent("heads"),
            layer.percent("channels"),
            f"{sum(layer.seconds.values()):.1f}",
        )
    out.print(table)


def _print_report(report: PruneReport, size: int, folder: Path, *, verbose: bool, estimated: float) -> None:
    plan = report.plan
    if verbose:
        _print_layers(report)
    starved = [(layer.layer, e) for layer in report.layers if layer.experts for e in layer.experts.fallback]
    if starved:
        out.print(
            f"[yellow]note:[/] {len(starved)} experts saw fewer tokens than they have channels (layer "
            f"{starved[0][0]}: expert {starved[0][1]}; all in slimgpt.json); tokens of the whole layer were added for "
            "them. More calibration text helps",
            soft_wrap=True,
        )
    if written := report.calibration.get("self_written"):
        total = report.seconds + written["seconds"]
        out.print(
            f"calibrated on text that the model wrote: {sum(written['documents'].values()):,} documents, "
            f"{written['sampled_tokens']:,} tokens in {written['seconds']:.0f} s, "
            f"{written['seconds'] / total:.0%} of the run; left out: {written['left_out']['short']} short or looping, "
            f"{written['left_out']['repeated']} repeating others",
            soft_wrap=True,
        )
    if tried := report.allocation.get("experts"):
        from slimgpt.pruning.report import trials_text

        pruning = report.execution.get("processor_seconds", 0.0)
        out.print(f"experts: {trials_text(tried)} (the pruning itself: {pruning:.0f})", soft_wrap=True, highlight=False)
    if info := report.distillation:
        far, text = (
            f"{info[name]['before']:.3f} -> {info[name]['after']:.3f}" for name in ("divergence", "cross_entropy")
        )
        out.print(
            f"trained on {info['tokens']:,} tokens in {info['seconds']:.0f} s: on held-out text, divergence from the "
            f"dense model {far}, cross-entropy {text} nats per token" + ("" if info["kept"] else "; not kept"),
            soft_wrap=True,
        )
    out.print(
        f"removed {plan.achieved:.2%} of the decoder layers (asked: {report.asked()}) in "
        f"{duration(report.seconds)} (estimated: {duration(estimated)})\n"
        f"{plan.parameters_before:,} -> {plan.parameters:,} parameters, {size:,} bytes of weights\n"
        f"saved {show(folder)} (report: slimgpt.json, plot: widths.png, card: README.md)",
        soft_wrap=True,
        highlight=False,
    )
    print_dense_comparison(report.divergence)
    if report.speed:
        out.print(f"speed: {report.speed_text()}", soft_wrap=True, highlight=False)
