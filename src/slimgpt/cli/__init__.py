"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Annotated

import typer
from typer.models import CommandInfo, TyperInfo

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
from slimgpt.runtime.interrupts import end_on_interrupts

PANELS = {
    "Prune": "demo scan plan prune recover",
    "Measure": "compare evaluate speed inspect",
    "Use": "generate chat export verify",
    "Models and data": "families convert data reproduce",
}
"""The commands as the help lists them."""

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
    """Prune a language model: remove heads, FFN channels and experts, repair the rest, save a checkpoint."""


def _in_panels() -> None:
    """Order the commands as :data:`PANELS` lists them."""
    panels = {name: panel for panel, names in PANELS.items() for name in names.split()}
    for each in (*app.registered_commands, *app.registered_groups):
        each.rich_help_panel = panels[_name(each)]
    app.registered_commands.sort(key=lambda each: list(panels).index(_name(each)))


def _name(command: CommandInfo | TyperInfo) -> str:
    """Of a command, which is its function's unless it is given."""
    return command.name or getattr(command.callback, "__name__", "")


_in_panels()


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
    finally:
        end_on_interrupts()  # an exception while Python shuts down could only be a traceback
