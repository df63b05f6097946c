"""Shared parts of all commands: the app, consoles, error handling, options and progress."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from slimgpt.errors import NumericalError, OutputError, RankError, SlimGPTError, VerificationError

if TYPE_CHECKING:
    from slimgpt.planning.plan import Plan
    from slimgpt.pruning.report import LayerReport

    OnLayer = Callable[[LayerReport, Plan], None]
    OnMeasured = Callable[[int, int, float], None]
    OnDistilled = Callable[[int, int, float, float], None]
    OnRehearsed = Callable[[str, int, int, float], None]
    Calls = tuple[OnLayer, OnMeasured, OnDistilled, OnRehearsed]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


def show(path: object) -> str:
    """A path or name as it is printed: square brackets are text, not markup."""
    return escape(str(path))


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one clear message and exit code 2 (1 for a comparison that failed), and Ctrl-C into 130."""

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
            raise typer.Exit(1 if isinstance(error, VerificationError) else 2) from None
        except KeyboardInterrupt as stop:
            err.print(f"interrupted; {str(stop) or 'no unfinished folder was left'}", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from None

    return wrapped


def check_json(file: Path | None, overwrite: bool, option: str = "--json") -> None:
    """Refuse a file for results early.

    Args:
        option: which names it.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    if file is not None and file.exists() and not overwrite:
        raise OutputError(f"{file} exists; give another file, or pass --overwrite to replace it")
    if file is not None and not file.absolute().parent.is_dir():
        raise OutputError(f"{file.absolute().parent} is no folder; make it first, or give another place for {option}")


def write_json(file: Path | None, values: Any) -> None:
    """Write results, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def silence_libraries() -> None:
    """Called by every command after its imports: collect garbage again, and keep the libraries' own progress bars and
    warnings out of ours."""
    gc.enable()
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
