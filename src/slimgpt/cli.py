"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from slimgpt import assets
from slimgpt.config import PruneConfig
from slimgpt.errors import OutputError, SlimGPTError, UsageError

if TYPE_CHECKING:
    from slimgpt.demo import DemoResult
    from slimgpt.planning import Plan
    from slimgpt.pruning import LayerReport, PruneReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A hub id, a local folder, a .gguf file, or 'demo'.")]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code from the model's repository run.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")]

DEFAULTS = PruneConfig()


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one clear message and exit code 2, and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        # A terminated run cleans up like an interrupted one.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            command(*args, **kwargs)
        except SlimGPTError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("interrupted; no unfinished folder was left")
            raise typer.Exit(130) from None

    return wrapped


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"slimgpt {version('slimgpt')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Make a trained language model smaller.

    It removes attention heads and FFN channels, repairs the rest in closed form, and saves a checkpoint that loads
    anywhere.
    """


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Prune MODEL and save the smaller model as the folder OUT."""
    from slimgpt.api import execute, make_config, prepare
    from slimgpt.checkpoint import save, weight_bytes

    _quiet()
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
    )
    with out.status("checking the request and reading the text"):
        prepared = prepare(model, output, config, calibration, device, dtype, trust_remote_code, overwrite)
    _print_plan(prepared.plan)
    widest = max(layer.sizes["intermediate_size"] for layer in prepared.shape.layers)
    if prepared.windows.numel() < 2 * widest:
        out.print(
            f"[yellow]note:[/] {prepared.windows.numel():,} calibration tokens are few for matrices of {widest:,} "
            "columns: the repair fits them and not the text behind them; raise --num-samples or --seq-len",
            soft_wrap=True,
        )
    with _layer_progress() as on_layer:
        slim, report = execute(prepared, on_layer=on_layer)
    with out.status(f"saving {prepared.output}"):
        folder = save(slim, prepared.tokenizer, report, prepared.output, overwrite)
    _print_report(report, weight_bytes(folder), folder)


@app.command()
@friendly
def evaluate(
    model: ModelArgument,
    text: Annotated[str, typer.Option(help="A text file, or 'demo' (held-out speeches).")],
    window: Annotated[int, typer.Option(help="Tokens per window; 128 and 2048 are the literature's.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(help="Use only the first so many tokens.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the JSON file.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Perplexity of MODEL on a text, with the protocol that makes the number comparable."""
    from slimgpt.api import evaluate as run
    from slimgpt.api import read_text
    from slimgpt.models import load

    _quiet()
    if json_file is not None and json_file.exists() and not overwrite:
        raise OutputError(f"{json_file} exists; give another file, or pass --overwrite to replace it")
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise OutputError(
            f"{json_file.absolute().parent} is no folder; make it first, or give another place for --json"
        )
    if window < 2:
        raise UsageError(f"window {window} is too small: a window of n tokens predicts n - 1 of them")
    read_text(text)
    with out.status(f"loading {model}"):
        loaded, tokenizer = load(model, dtype, device, trust_remote_code)
    with _bar("windows") as (progress, task):
        result = run(
            loaded,
            tokenizer,
            text,
            window=window,
            max_tokens=max_tokens,
            batch_size=batch_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    values = {"model": model, "text": text, **result.to_json()}
    if json_file is not None:
        json_file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    out.print(
        f"perplexity [bold]{result.perplexity:.4f}[/] at window {result.window} over {result.tokens:,} tokens "
        f"({result.predicted:,} predicted) of {text}, {result.protocol['dtype']}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
@friendly
def inspect(
    model: ModelArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Widths per layer, parameters, bytes, and what was removed. Loads no weights."""
    from slimgpt.checkpoint import inspect as run

    _quiet()
    found = run(model, trust_remote_code)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
        return
    plan = (found.pruned or {}).get("plan")
    base = (found.pruned or {}).get("base_model")
    before = [layer["parameters_before"] for layer in found.pruned["layers"]] if found.pruned else None
    table = Table(title=f"{found.model} ({found.model_type})", title_justify="left")
    for column in ("layer", "heads", "KV heads", "FFN channels", "parameters", *(["removed"] if before else [])):
        table.add_column(column, justify="right")
    for index, layer in enumerate(found.layers):
        row = [
            str(index),
            *(str(layer.sizes[field]) for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size")),
            f"{layer.parameters:,}",
        ]
        table.add_row(*row, *([f"{1 - layer.parameters / before[index]:.1%}"] if before else []))
    out.print(table)
    out.print(f"parameters     {found.parameters:,}, of which {found.layer_parameters:,} in the decoder layers")
    if found.bytes is not None:
        out.print(f"bytes on disk  {found.bytes:,}")
    out.print(f"layers         {'all of the same widths' if found.uniform else 'of different widths'}")
    if plan:
        out.print(
            f"pruned         {plan['achieved']:.2%} of the decoder layers of {base}, which had "
            f"{plan['parameters_before']:,} parameters",
            soft_wrap=True,
        )


@app.command()
@friendly
def demo(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")] = Path("slimgpt-demo"),
    ratio: Annotated[float, typer.Option(help="Share of the decoder layers' parameters to remove.")] = 0.2,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
) -> None:
    """Prune SmolLM2-135M-Instruct and show it before and after; needs no hub, about three minutes on two cores."""
    from slimgpt.checkpoint import check_output
    from slimgpt.demo import run_demo

    _quiet()
    for part in ("slim", "dense"):
        check_output(output / part, overwrite)
    with _layer_progress() as on_layer:
        result = run_demo(
            output, ratio, num_samples, seq_len, overwrite, lambda text: out.print(f"[dim]{text}[/]"), on_layer
        )
    _print_demo(result)


@contextmanager
def _bar(unit: str) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out) as progress:
        yield progress, progress.add_task("", total=None)


@contextmanager
def _layer_progress() -> Iterator[Callable[[LayerReport, Plan], None]]:
    """A bar with the time left; where the output is no terminal, a line per layer."""
    if not out.is_terminal:
        start = time.perf_counter()

        def line(report: LayerReport, plan: Plan) -> None:
            done, n = report.layer + 1, len(plan.layers)
            left = (time.perf_counter() - start) / done * (n - done)
            out.print(f"{_describe(report)}  {done}/{n} layers, about {left:.0f} s left", soft_wrap=True)

        yield line
        return
    with _bar("layers") as (progress, task):

        def step(report: LayerReport, plan: Plan) -> None:
            progress.update(task, completed=report.layer + 1, total=len(plan.layers), description=_describe(report))

        yield step


def _describe(report: LayerReport) -> str:
    s = report.sizes
    return (
        f"layer {report.layer}: {s['num_attention_heads']}/{s['num_key_value_heads']} heads, "
        f"{s['intermediate_size']} channels, error {report.error['heads']:.1%} / {report.error['channels']:.1%}"
    )


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


def _print_demo(result: DemoResult) -> None:
    dense, slim = result.dense, result.slim
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
    from slimgpt.demo import PROMPT

    for name, sample in (("before", dense.sample), ("after", slim.sample)):
        out.print(f"[bold]{name}:[/] [dim]{PROMPT}[/]{escape(sample.removeprefix(PROMPT))}\n", highlight=False)
    out.print(
        f"\npruning took {result.report.seconds:.0f} s\n"
        f"plot:   {result.folder / 'widths.png'}\ntable:  {result.folder.parent / 'demo.json'}\n"
        f"folder: {result.folder}",
        soft_wrap=True,
        highlight=False,
    )


def _quiet() -> None:
    """Keep the libraries' own progress bars and warnings out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Entry point of the ``slimgpt`` command."""
    app()
