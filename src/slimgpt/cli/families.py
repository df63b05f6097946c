"""``slimgpt families``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from slimgpt.cli.console import app, handle_errors, out, silence_libraries


@app.command()
@handle_errors
def families(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A model_type or a common name, such as Qwen3.5."),
    ] = None,
    refused: Annotated[
        bool, typer.Option("--refused", help="Also list families that cannot be pruned, and why.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List what can be removed from each family of models."""
    from slimgpt.models.families.names import matching
    from slimgpt.models.families.support import families as run
    from slimgpt.planning.family_table import with_engines

    silence_libraries()
    families = run()
    if name is not None:
        kinds = matching(name, [family.model_type for family in families])
        families = [family for family in families if family.model_type in kinds]
    elif not (refused or as_json):
        families = [family for family in families if family.units]
    rows = [with_engines(family) for family in families]
    if as_json:
        typer.echo(json.dumps([{**asdict(row), "level": row.level} for row in rows]))
        return
    table = Table(title_justify="left")
    for column in ("family", "can be removed", "in a stock class (--uniform)", "runs in", "note"):
        table.add_column(column)
    for family in rows:
        stock = "all" if family.uniform == family.units else ", ".join(family.uniform) or "-"
        known_as = f"\n[dim]{', '.join(family.known_as)}[/]" if family.known_as else ""
        table.add_row(
            family.model_type + known_as,
            ", ".join(family.units) or "nothing",
            stock if family.units else "",
            family.engines_text(),
            family.note,
        )
    out.print(table)
    out.print(
        "Layers that differ, and what no stock class holds, load with trust_remote_code=True: a small modeling file "
        "travels in the folder. Another family: docs/adding-a-family.md",
        soft_wrap=True,
    )
