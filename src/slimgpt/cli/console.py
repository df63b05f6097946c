"""Shared parts of all commands: the app, consoles, error handling, options and progress."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from slimgpt.errors import DISK_FULL, NumericalError, OutputError, RankError, SlimGPTError, VerificationError

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
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            say_disk_full(error)
            raise typer.Exit(2) from None

    return wrapped


def say_disk_full(error: OSError) -> None:
    """Say that there was no room for what a command prints, or for a temporary file."""
    where = error.filename or "standard output or a temporary file"
    err.print(
        f"[bold red]error:[/] writing {show(where)} failed: {error.strerror}; free some space, or write elsewhere "
        "(TMPDIR)",
        soft_wrap=True,
        highlight=False,
    )
    with suppress(OSError):  # what standard output still holds back would fail once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    """Write results, if a file was asked for; see :func:`write_file`."""
    if file is not None:
        write_file(file, json.dumps(values, indent=1) + "\n")


def write_file(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OutputError: the disk is full, or the folder may not be written to.
    """
    regular = file.is_file() or not file.exists()
    draft = file.with_name(f".{file.name}.partial") if regular else file  # a device has no other name
    try:
        draft.write_text(text, encoding="utf-8")
        if regular:
            draft.replace(file)
    except OSError as error:
        raise OutputError(f"writing {file} failed: {error}; free some space, or give another file") from error
    finally:
        if regular:
            draft.unlink(missing_ok=True)


def silence_libraries() -> None:
    """Called by every command after its imports: collect garbage again, let signals be exceptions, and keep the
    libraries' own progress bars and warnings out of ours."""
    gc.enable()
    # A terminated run cleans up like an interrupted one. Not before: an exception amid the imports of NumPy or torch is
    # swallowed there, or comes out as another.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
