"""``slimgpt reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from slimgpt.cli.console import app, handle_errors, out, show, silence_libraries
from slimgpt.cli.options import DeviceOption
from slimgpt.cli.progress import phases

DEFAULT_OUT = Path("slimgpt-reproduced")


@app.command()
@handle_errors
def reproduce(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of one in recipes/, such as llama-7b.")
    ],
    *,
    output: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of tables and finished rows.")
    ] = DEFAULT_OUT,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Run a small variant on SmolLM2, to see that it works here.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Another model for all rows, such as a local copy.")] = None,
    device: DeviceOption = "auto",
    data_dir: Annotated[Path | None, typer.Option(help="Read task rows from this folder instead of the hub.")] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep the pruned models in DIR.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Repeat finished rows.")] = False,
) -> None:
    """Measure a table of the paper row by row.

    A run that was stopped goes on where it was: the same command again.
    """
    from slimgpt.reproducing import reproduce as run
    from slimgpt.reproducing.table import cells

    silence_libraries()
    with phases() as shown:

        def on_row(number: int, total: int, text: str) -> None:
            shown.step("rows", number, total, state=text)
            if not out.is_terminal:
                out.print(f"{number + 1}/{total} {text}", soft_wrap=True, highlight=False)

        done, results = run(
            recipe,
            output,
            tiny=tiny,
            model=model,
            device=device,
            data_dir=data_dir,
            keep_models=keep_models,
            overwrite=overwrite,
            on_row=on_row,
        )
        shown.step("rows", len(done.rows), len(done.rows))
    head, body = cells(results)
    table = Table(*head, title=done.title)
    for line in body:
        table.add_row(*line)
    out.print(table)
    name = f"{done.name}-tiny" if done.tiny else done.name
    out.print(f"wrote {show(output / name)}.md and {show(output / name)}.json", soft_wrap=True, highlight=False)
