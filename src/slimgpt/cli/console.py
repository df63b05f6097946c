"""What every command shares: the app, the consoles, error handling, options and progress."""

from __future__ import annotations

import functools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimgpt.errors import SlimGPTError

if TYPE_CHECKING:
    from slimgpt.planning import Plan
    from slimgpt.pruning import LayerReport

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
        try:
            command(*args, **kwargs)
        except SlimGPTError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("interrupted; no unfinished folder was left")
            raise typer.Exit(130) from None

    return wrapped


@contextmanager
def bar(unit: str) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=out) as progress:
        yield progress, progress.add_task("", total=None)


@contextmanager
def layer_progress() -> Iterator[Callable[[LayerReport, Plan], None]]:
    """A bar with the time left; where the output is no terminal, a line per layer."""
    if not out.is_terminal:
        start = time.perf_counter()

        def line(report: LayerReport, plan: Plan) -> None:
            done, n = report.layer + 1, len(plan.layers)
            left = (time.perf_counter() - start) / done * (n - done)
            out.print(f"{_describe(report)}  {done}/{n} layers, about {left:.0f} s left", soft_wrap=True)

        yield line
        return
    with bar("layers") as (progress, task):

        def step(report: LayerReport, plan: Plan) -> None:
            progress.update(task, completed=report.layer + 1, total=len(plan.layers), description=_describe(report))

        yield step


def _describe(report: LayerReport) -> str:
    s = report.sizes
    return (
        f"layer {report.layer}: {s['num_attention_heads']}/{s['num_key_value_heads']} heads, "
        f"{s['intermediate_size']} channels, error {report.error['heads']:.1%} / {report.error['channels']:.1%}"
    )


def quiet() -> None:
    """Keep the libraries' own progress bars and warnings out of ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
