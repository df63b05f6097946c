"""Write the reference pages from the command line's options and from docstrings: ``python docs/make_reference.py``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import slimgpt
from slimgpt.cli import app
from slimgpt.config import PruneConfig
from slimgpt.models.families.support import EXPERT_UNITS
from slimgpt.planning.family_table import FamilyRow, family_rows
from slimgpt.runtime.settings import settings_of

HERE = Path(__file__).resolve().parent / "reference"
HEAD = """# Commands

Written by `docs/make_reference.py` from the command line itself. Every command also has `--help` (`-h`), `--quiet`
(`-q`, errors only) and `--config FILE`: options as lines of TOML, such as `ratio = 0.2`; what is typed wins. Everything
is checked before any weight is read; a request that cannot be met ends with one line and exit code 2, a comparison that
fails with 1, an interrupted run with 130.
"""
COMMON = ("quiet", "config_file", "help")


def cell(text: str) -> str:
    """Text in a table."""
    return " ".join(text.split()).replace("|", "\\|")


def default_of(parameter: Any) -> str:
    """What holds if an option is not given."""
    if parameter.required:
        return "required"
    shown = parameter.show_default if isinstance(getattr(parameter, "show_default", None), str) else ""
    if shown:
        return shown
    if getattr(parameter, "is_flag", False):
        return "off" if not parameter.default else "on"
    return "" if parameter.default is None else f"`{parameter.default}`"


def rows(command: Any, details: dict[str, str]) -> Iterator[str]:
    """Arguments, then options by panel."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in COMMON]
    if arguments:
        yield "| argument | |\n|---|---|"
        for parameter in arguments:
            shown = default_of(parameter)
            optional = "" if parameter.required or not shown else f" Default: {shown}."
            yield f"| `{parameter.metavar or parameter.name.upper()}` | {cell(parameter.help or '')}{optional} |"
        yield ""
    panels: dict[str, list[Any]] = {}
    rest = "Other options" if any(parameter.rich_help_panel for parameter in options) else "option"
    for parameter in options:
        panels.setdefault(parameter.rich_help_panel or rest, []).append(parameter)
    for panel in sorted(panels, key=lambda name: name == rest):
        yield f"| {panel} | default | |\n|---|---|---|"
        for parameter in panels[panel]:
            names = " / ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            text = cell(f"{parameter.help or ''} {details.get(parameter.name, '')}")
            yield f"| {names} | {cell(default_of(parameter))} | {text} |"
        yield ""


def command_sections(command: Any, words: str) -> Iterator[str]:
    """A section for a command, or for each of those below it."""
    if getattr(command, "commands", None):
        for name, below in command.commands.items():
            yield from command_sections(below, f"{words} {name}")
        return
    details = {name: entry.detail for name, entry in settings_of(PruneConfig).items()}
    details = details if words.split()[-1] in ("prune", "scan") else {}
    yield f"## {words}\n"
    yield f"{command.help}\n"
    yield from rows(command, details)
    if command.epilog:
        examples = [line for line in command.epilog.splitlines() if line and line != "Examples:"]
        yield "```\n" + "\n".join(examples) + "\n```\n"


def commands_page() -> str:
    """The page of the command line."""
    command: Any = typer.main.get_command(app)
    return "\n".join([HEAD, *command_sections(command, "slimgpt")]).rstrip() + "\n"


def signature_of(value: Any) -> str:
    """A call with its keywords, one to a line where it is long."""
    try:
        listed = inspect.signature(value).parameters.values()
    except ValueError:  # an exception
        return "(message)"
    parameters = [str(parameter.replace(annotation=parameter.empty)) for parameter in listed]
    kinds = [parameter.kind for parameter in listed]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parameters.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    line = ", ".join(parameters)
    return f"({line})" if len(line) < 90 else "(\n    " + ",\n    ".join(parameters) + ",\n)"


def python_page() -> str:
    """The page of the public names, from their docstrings."""
    parts = ["# Python\n\nWritten by `docs/make_reference.py` from the docstrings of `slimgpt`'s public names.\n"]
    for name in sorted(slimgpt.__all__):
        value = getattr(slimgpt, name)
        if not callable(value):
            continue
        kind = "class" if inspect.isclass(value) else "def"
        text = inspect.getdoc(value) or ""
        parts.append(
            f"## {name}\n\n```python\n{kind} slimgpt.{name}{signature_of(value)}\n```\n\n```text\n{text}\n```\n"
        )
    return "\n".join(parts).rstrip() + "\n"


FAMILIES_HEAD = """# Table of families

Written by `docs/make_reference.py` from the table that `slimgpt families` prints; `slimgpt families NAME` finds a
family by its `model_type` or by the names of its models. The tests that each family passes, and their results, are in
[benchmarks/results/families.md](../benchmarks/results/families.md).

- **In a stock class**: with `--uniform` this is removed so that a class of transformers loads the folder as it is. All
  else loads with `trust_remote_code=True`: a small modeling file travels in the folder.
- **Runs in**: engines for layers of any widths, then those that equal layers (`--uniform`) add; for the default config
  of the type. The verdicts come from the engines' own sources; what was run is in [serving.md](guides/serving.md).
  `slimgpt plan MODEL` gives the verdicts for a checkpoint, with the form to export.
"""


def family_lines(rows: list[FamilyRow]) -> Iterator[str]:
    """A table of families."""
    yield "| family | models | can be removed | in a stock class | runs in | note |\n|---|---|---|---|---|---|"
    for row in rows:
        stock = "all" if row.uniform == row.units else ", ".join(row.uniform) or "-"
        cells = (", ".join(row.known_as), ", ".join(row.units), stock, row.engines_text(), row.note)
        yield f"| `{row.model_type}` | {' | '.join(map(cell, cells))} |"


def families_page() -> str:
    """The page of the families of models."""
    rows = family_rows()
    text = [row for row in rows if row.units and not row.inside]
    mixtures = [row for row in text if EXPERT_UNITS in row.units]
    parts = [
        FAMILIES_HEAD,
        "## Decoders\n",
        *family_lines([row for row in text if row not in mixtures]),
        "\n## Mixtures of experts\n",
        *family_lines(mixtures),
        "\n## Multimodal models\n\nThe language model inside is pruned on text; all else stays as it is, to the bit. "
        "Which one\nis inside depends on the checkpoint; here it is that of the default config.\n",
        *family_lines([row for row in rows if row.units and row.inside]),
        "\n## Refused\n",
    ]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.units:
            names = f" ({', '.join(row.known_as)})" if row.known_as else ""
            reasons.setdefault(row.note, []).append(f"`{row.model_type}`{names}")
    parts += [f"- {', '.join(names)}: {cell(reason)}." for reason, names in reasons.items()]
    parts.append("\nWhatever is not on this page nobody has described: [adding-a-family.md](adding-a-family.md).")
    return "\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """The text of every page."""
    families = HERE.parent / "families.md"
    return {HERE / "commands.md": commands_page(), HERE / "python.md": python_page(), families: families_page()}


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {file.name}\n")
