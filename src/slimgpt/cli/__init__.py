"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Annotated

import typer

from slimgpt.cli import (  # importing a module registers its commands
    compare,
    convert,
    data,
    demo,
    evaluate,
    export,
    families,
    generate,
    inspect,
    plan,
    prune,
    recover,
    reproduce,
    scan,
    speed,
)
from slimgpt.cli.console import app, say_disk_full
from slimgpt.errors import DISK_FULL

__all__ = [
    "app",
    "compare",
    "convert",
    "data",
    "demo",
    "evaluate",
    "export",
    "families",
    "generate",
    "inspect",
    "main",
    "plan",
    "prune",
    "recover",
    "reproduce",
    "scan",
    "speed",
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"slimgpt {version('slimgpt')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make a trained language model smaller.

    It removes attention heads and FFN channels, repairs the rest in closed form, and saves an ordinary
    Hugging Face checkpoint.
    """


def main() -> None:
    """Entry point of the ``slimgpt`` command."""
    # Importing torch and transformers makes many objects that stay; looking through them for garbage, and once more at
    # the end, takes a third of the time of a short command. `quiet` turns it on again.
    gc.disable()
    atexit.register(gc.freeze)
    try:
        app()
    except OSError as error:  # from printing help or the version; commands see to theirs
        if error.errno not in DISK_FULL:
            raise
        say_disk_full(error)
        sys.exit(2)
