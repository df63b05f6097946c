"""Shared parts of all commands: the app, consoles, error handling and the options that every command has."""

from __future__ import annotations

import copy
import difflib
import functools
import gc
import inspect
import json
import os
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from typer.models import OptionInfo

from slimgpt.cli.early_checks import as_typed, check_values
from slimgpt.errors import (
    DISK_FULL,
    UNUSABLE_PATH,
    NumericalError,
    OutputError,
    RankError,
    SlimGPTError,
    UsageError,
    VerificationError,
    is_out_of_memory,
    one_line,
)
from slimgpt.io.atomic import write_file
from slimgpt.runtime.interrupts import heed_interrupts, interrupts_ignored, interrupts_restored

LONGEST_PATH = 200
"""Characters of a path in a message, where the path itself is what is wrong."""

DISTRIBUTED = ("prune", "recover")
"""Commands that several processes share the work of."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class TerminalConsole(Console):
    """A console that keeps long lines whole in files and pipes; on a terminal it breaks them between words."""

    def print(self, *objects: Any, **options: Any) -> None:
        """As of rich; ``soft_wrap`` counts where the output is no terminal."""
        soft_wrap = options.pop("soft_wrap", None)
        super().print(*objects, soft_wrap=False if self.is_terminal else soft_wrap, **options)

    def print_commands(self, *lines: str) -> None:
        """Print what is there to be copied: never broken."""
        super().print("\n".join(map(escape, lines)), soft_wrap=True, highlight=False)


# rich would colour the digits of "134,515,008" in three parts.
out = TerminalConsole(highlight=False)
err = TerminalConsole(stderr=True, highlight=False)


def show(path: object) -> str:
    """A path or name as it is printed: square brackets are text, not markup."""
    return escape(str(path))


def handle_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn our errors into one clear message and exit code 2 (1 for a comparison that failed), and Ctrl-C into 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, quiet: bool = False, **kwargs: Any) -> None:
        kwargs.pop("config_file", None)  # its callback has taken the values
        first = os.environ.get("RANK", "0") == "0"  # under torchrun the first process speaks for all
        out.quiet = quiet or not first
        try:
            _check_processes(command.__name__)
            check_values(command.__name__, kwargs)
            with interrupts_restored():
                command(*args, **kwargs)
        except SlimGPTError as error:
            if not first and not isinstance(error, (RankError, NumericalError)):  # what only this process can know
                raise typer.Exit(2) from None
            text = escape(as_typed(str(error), flags))
            _say_end(f"[bold red]error:[/] {text}")
            raise typer.Exit(1 if isinstance(error, VerificationError) else 2) from None
        except KeyboardInterrupt as stop:
            if not first:
                raise typer.Exit(130) from None
            _say_end(f"interrupted; {str(stop) or 'no unfinished folder was left'}")
            raise typer.Exit(130) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            _say_end(
                f"[bold red]error:[/] not enough memory: {escape(one_line(error))}; ask for less at once, such as a "
                "smaller batch or shorter texts"
            )
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno in DISK_FULL:
                say_disk_full(error)
            elif error.errno in UNUSABLE_PATH and error.filename:
                path = show(str(error.filename)[:LONGEST_PATH])
                _say_end(f"[bold red]error:[/] '{path}' cannot be used: {error.strerror}; give another path")
            else:
                raise
            raise typer.Exit(2) from None

    own, common = (inspect.signature(each, eval_str=True).parameters.values() for each in (command, _common_options))
    flags = _flags(own)
    set_parameters(wrapped, [with_option(parameter, **_switch(parameter)) for parameter in (*own, *common)])
    wrapped.__doc__ = unwrap(command.__doc__)
    return wrapped


def _say_end(text: str) -> None:
    """Print why a command ends, whatever signal comes meanwhile."""
    with interrupts_ignored():
        err.print(text, soft_wrap=True, highlight=False)


def _flags(parameters: Iterable[inspect.Parameter]) -> dict[str, str]:
    """The options of a command as they are typed, by the names of their parameters."""
    flags = {}
    for parameter in parameters:
        option = (get_args(parameter.annotation)[1:] or [None])[0]
        if isinstance(option, OptionInfo):
            words = [word for word in (option.default, *(option.param_decls or ())) if isinstance(word, str)]
            named = next((word for word in words if word.startswith("--")), f"--{parameter.name.replace('_', '-')}")
            flags[parameter.name] = named.partition("/")[0]
    return flags


def _check_processes(command: str) -> None:
    """Refuse a command under ``torchrun`` that every process would do anew.

    Raises:
        UsageError: with its name.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes not in ("", "1") and "RANK" in os.environ and command not in DISTRIBUTED:
        raise UsageError(
            f"{command} runs in one process, and WORLD_SIZE is {processes}; start it without torchrun, which is for "
            f"{' and '.join(DISTRIBUTED)}"
        )


def unwrap(text: str | None) -> str:
    """A docstring with every paragraph on one line: help breaks lines where the terminal ends."""
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def set_parameters(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function another list of parameters, as typer reads them."""
    signature = inspect.signature(command).replace(parameters=parameters)
    command.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def with_option(parameter: inspect.Parameter, **changes: Any) -> inspect.Parameter:
    """A parameter whose option or argument is presented in another way; the original may belong to several commands."""
    hint, *metadata = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else (None,)
    if not metadata or not changes:
        return parameter
    info = copy.copy(metadata[0])
    for name, value in changes.items():
        setattr(info, name, value)
    return parameter.replace(annotation=Annotated[hint, info])


def _switch(parameter: inspect.Parameter) -> dict[str, str]:
    """Nothing stands beside a switch in place of a value."""
    hint = get_args(parameter.annotation)[:1]
    return {"metavar": " "} if hint and hint[0] in (bool, bool | None) else {}


def _read_config_file(context: typer.Context, file: Path | None) -> Path | None:
    """Take the values of a TOML file as the defaults of a command's options."""
    if file is None or context.resilient_parsing:
        return file
    try:
        if not file.is_file():
            raise OSError("it does not exist, or is no regular file")
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{file} is no TOML file that can be read: {error}") from None
    options = {
        name.removeprefix("--").replace("-", "_"): parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        for name in parameter.opts
        if name.startswith("--")
    }
    defaults = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in options or name in ("help", "config"):
            near = difflib.get_close_matches(name, options, 1)
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"see {context.command_path} --help"
            raise typer.BadParameter(f"{file} names {key}, which is no option of {context.command_path}; {hint}")
        if isinstance(value, dict):
            raise typer.BadParameter(f"{file} has a table [{key}]; write options as lines such as ratio = 0.2")
        repeated = getattr(options[name], "multiple", False)
        if isinstance(value, list) and not repeated:
            value = ",".join(map(str, value))
        defaults[options[name].name] = [value] if repeated and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


def _common_options(
    *,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            callback=_read_config_file,
            is_eager=True,
            help="Options as lines of TOML, such as ratio = 0.2.",
        ),
    ] = None,
) -> None:
    """The options of every command."""


def say_disk_full(error: OSError) -> None:
    """Say that there was no room for what a command prints, or for a temporary file."""
    where = error.filename or "standard output or a temporary file"
    _say_end(
        f"[bold red]error:[/] writing {show(where)} failed: {error.strerror}; free some space, or write elsewhere "
        "(TMPDIR)"
    )
    with suppress(OSError):  # what standard output still holds back would fail once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_json(file: Path | None, overwrite: bool, option: str = "--json") -> None:
    """Refuse a file for results early.

    Args:
        option: which names it.

    Raises:
        OutputError: it exists or is a folder, its own folder is none or may not be written to, or its name is too long.
    """
    if file is None:
        return
    from slimgpt.io.folders import check_name, check_writable  # imports safetensors

    folder = file.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder; make it first, or give another place for {option}")
    check_writable(folder)
    check_name(file)
    if file.is_dir() or (file.is_symlink() and not file.exists()):
        raise OutputError(f"{file} is a folder, or a link that leads nowhere; give another file for {option}")
    if file.exists() and not overwrite:
        raise OutputError(f"{file} exists; give another file, or pass --overwrite to replace it")


def write_json(file: Path | None, values: Any) -> None:
    """Write results, if a file was asked for; see :func:`slimgpt.io.atomic.write_file`."""
    if file is not None:
        write_file(file, json.dumps(values, indent=1) + "\n")


def check_folder(folder: Path) -> None:
    """Refuse a folder for results early that cannot be made or written to.

    Raises:
        OutputError: it, or what it would be made in, is a file or may not be written to.
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
    if place.is_symlink() and not place.exists():
        raise OutputError(f"{folder} cannot be a folder: {place} is a link that leads nowhere; give another --out")
    if not place.is_dir():
        raise OutputError(f"{folder} cannot be a folder: {place} is a file; give another --out")
    from slimgpt.io.folders import check_writable  # imports safetensors

    check_writable(place)


def print_uploaded(repository: str | None) -> None:
    """Say that the result is on the hub.

    Args:
        repository: its name or address; ``None``: nothing was uploaded.
    """
    if repository is not None:
        out.print(f"uploaded to {show(repository)}", soft_wrap=True, highlight=False)


def silence_libraries() -> None:
    """Called by every command after its imports: collect garbage again, let signals be exceptions, and keep the
    libraries' own progress bars and warnings out of ours."""
    gc.enable()
    # A terminated run cleans up like an interrupted one. Not before: an exception amid the imports of NumPy or torch is
    # swallowed there, or comes out as another.
    heed_interrupts()
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # those of downloads, too, which are worth seeing
    if err.is_terminal and not out.quiet:
        enable_progress_bars()
