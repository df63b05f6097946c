"""``slimgpt convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimgpt.cli.console import app, check_json, handle_errors, out, show, silence_libraries, write_json


@app.command()
@handle_errors
def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Convert a checkpoint that is Llama under other names (Baichuan-7B, InternLM2) to Llama.

    No code of the repository runs, and no pickled file is read.
    """
    from slimgpt.checkpoint.convert import convert as run

    silence_libraries()
    check_json(json_file, overwrite)
    with out.status(f"writing {show(output)}"):
        result = run(model, output, overwrite)
    write_json(json_file, result.to_json())
    out.print(
        f"wrote {show(result.path)}: {result.model_type} as llama, {result.layout}; {result.parameters:,} parameters",
        soft_wrap=True,
        highlight=False,
    )
    for note in result.notes:
        out.print(f"[yellow]note:[/] {show(note)}", soft_wrap=True)
