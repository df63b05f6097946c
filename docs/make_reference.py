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


def pages() -> dict[Path, str]:
    """The text of every page."""
    return {HERE / "commands.md": commands_page(), HERE / "python.md": python_page()}


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote {file.name}\n")
