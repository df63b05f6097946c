"""What every command shares: the app, the consoles, error handling, options and progress."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimgpt.errors import NumericalError, OutputError, RankError, SlimGPTError

if TYPE_CHECKING:
    import torch

    from slimgpt.planning import Plan
    from slimgpt.pruning import LayerReport

    OnLayer = Callable[[LayerReport, Plan], None]
    OnMeasured = Callable[[int, int, float], None]
    OnDistilled = Callable[[int, int, float, float], None]

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


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one clear message and exit code 2, and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        # A terminated run cleans up like an interrupted one.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        first = os.environ.get("RANK", "0") == "0"  # under torchrun the first process speaks for all
        out.quiet = not first
        try:
            command(*args, **kwargs)
        except SlimGPTError as error:
            if not first and not isinstance(error, (RankError, NumericalError)):  # what only this process can know
                raise typer.Exit(2) from None
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            err.print(f"interrupted; {str(stop) or 'no unfinished folder was left'}", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from None

    return wrapped


@contextmanager
def bar(unit: str) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out) as progress:
        yield progress, progress.add_task("", total=None)


@contextmanager
def count_bar(unit: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar for work whose amount is known only once it starts."""
    with bar(unit) as (progress, task):

        def on_start(total: int) -> Callable[[int], None]:
            progress.update(task, total=total)
            return lambda done: progress.advance(task, done)

        yield on_start


@contextmanager
def layer_progress(tokens: int, device: torch.device) -> Iterator[tuple[OnLayer, OnMeasured, OnDistilled]]:
    """A bar; where the output is no terminal, lines: what to call after every pruned and measured layer and every step
    of the training.

    The time left is that of the layers seen so far times those to come. Layers that a resumed run finds finished
    count with what they took when they were pruned, so the figure is right from the first of them on.
    """
    seconds: list[float] = []

    def state(report: LayerReport, plan: Plan) -> str:
        from slimgpt.pruning.memory import used_bytes

        seconds.append(sum(report.seconds.values()))
        left = sum(seconds) / len(seconds) * (len(plan.layers) - report.layer - 1)
        return (
            f"{tokens / max(seconds[-1], 1e-9):,.0f} tokens/s, {used_bytes(device) / 1e9:.2f} GB in use, "
            f"about {timedelta(seconds=round(left))} left"
        )

    measured: list[float] = []

    def measuring(steps: int, took: float) -> str:
        measured.append(took)
        left = sum(measured) / len(measured) * (steps - len(measured))
        return f"measuring what each layer's widths cost, about {timedelta(seconds=round(left))} left"

    trained: list[float] = []

    def training(steps: int, divergence: float, took: float) -> str:
        trained.append(took)
        left = sum(trained) / len(trained) * (steps - len(trained))
        return (
            f"training towards the dense model, divergence {divergence:.3f} nats per token, "
            f"about {timedelta(seconds=round(left))} left"
        )

    if not out.is_terminal:

        def distilled_line(step: int, steps: int, divergence: float, took: float) -> None:
            said = training(steps, divergence, took)
            if (step + 1) % 4 == 0 or step + 1 == steps:
                out.print(f"{step + 1}/{steps} steps, {said}", soft_wrap=True)

        def measured_line(step: int, steps: int, took: float) -> None:
            said = measuring(steps, took)
            if (step + 1) % 10 == 0 or step + 1 == steps:
                out.print(f"{step + 1}/{steps} steps, {said}", soft_wrap=True)

        def line(report: LayerReport, plan: Plan) -> None:
            done = f"{report.layer + 1}/{len(plan.layers)} layers"
            out.print(f"{_describe(report)}  {done}, {state(report, plan)}", soft_wrap=True)

        yield line, measured_line, distilled_line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=out) as progress:
        task = progress.add_task("", total=None, state="")

        def step(report: LayerReport, plan: Plan) -> None:
            done, total = report.layer + 1, len(plan.layers)
            said = f"layers, {state(report, plan)}"
            progress.update(task, completed=done, total=total, description=_describe(report), state=said)

        def measured_step(step: int, steps: int, took: float) -> None:
            state = measuring(steps, took)
            progress.update(task, completed=step + 1, total=steps, description="step", state=state)

        def distilled_step(step: int, steps: int, divergence: float, took: float) -> None:
            state = training(steps, divergence, took)
            progress.update(task, completed=step + 1, total=steps, description="step", state=state)

        yield step, measured_step, distilled_step


def _describe(report: LayerReport) -> str:
    from slimgpt.models.mixtures import ffn_text

    s = report.sizes
    return (
        f"layer {report.layer}: {s['num_attention_heads']}/{s['num_key_value_heads']} heads, "
        f"{ffn_text(s)} channels, error {report.percent('heads', 1)} / {report.percent('channels', 1)}"
    )


def check_json(file: Path | None, overwrite: bool) -> None:
    """Refuse a file for results early.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    if file is not None and file.exists() and not overwrite:
        raise OutputError(f"{file} exists; give another file, or pass --overwrite to replace it")
    if file is not None and not file.absolute().parent.is_dir():
        raise OutputError(f"{file.absolute().parent} is no folder; make it first, or give another place for --json")


def write_json(file: Path | None, values: Any) -> None:
    """Write results, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def quiet() -> None:
    """What every command does after its imports: collect garbage again, and keep the libraries' own progress bars and
    warnings out of ours."""
    gc.enable()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
