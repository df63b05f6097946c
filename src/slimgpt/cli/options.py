"""Arguments and options that several commands share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from slimgpt.cli.console import set_parameters, with_option
from slimgpt.runtime.settings import Setting, interleave, settings_of

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, a .gguf file, or 'demo'.")
]


TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model's repository.")]


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]


DtypeOption = Annotated[str, typer.Option(help="auto (as stored), float32, float16 or bfloat16.")]


PushOption = Annotated[
    str | None,
    typer.Option("--push-to-hub", metavar="REPO", help="Upload the result to this hub repository, such as me/slim."),
]


PrivateOption = Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a new repository private.")]


def setting_options(
    owner: type, command: str, before: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**settings`` an option for every setting that is meant for it.

    Args:
        owner: the dataclass of settings.
        command: its name.
        before: which settings stand before which written parameter; see :func:`slimgpt.runtime.settings.interleave`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own = [
            parameter.replace(kind=parameter.KEYWORD_ONLY)
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        types = get_type_hints(owner)
        options = {
            name: _option(name, entry, types[name], getattr(owner, name))
            for name, entry in settings_of(owner, command).items()
        }
        parameters = interleave(own, options, before)
        set_parameters(function, parameters)
        return function

    return decorate


def help_panels(panels: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Show the options of a command in panels.

    Args:
        panels: the names of parameters of each, in order and with spaces between them; what no panel names stays in
            the first one.
    """
    places = {name: panel for panel, names in panels.items() for name in names.split()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = dict(inspect.signature(command, eval_str=True).parameters)
        chosen = [with_option(parameters.pop(name), rich_help_panel=panel) for name, panel in places.items()]
        kept = (
            [p for p in parameters.values() if p.default is p.empty],
            [p for p in parameters.values() if p.default is not p.empty],
        )
        keyword_only = [p.replace(kind=p.KEYWORD_ONLY) for p in (*chosen, *kept[1])]
        set_parameters(command, [*kept[0], *keyword_only])
        return command

    return decorate


def _option(name: str, entry: Setting, hint: Any, default: Any) -> inspect.Parameter:
    """The option of one setting: text where it may be text, a switch for what is true or false."""
    types = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    chosen = str if str in types else next(each for each in types if each is not type(None))
    default = None if entry.unset is not None else default
    flag = f"--{name.replace('_', '-')}"
    flags = [] if chosen is not bool else [f"{flag}/--no{flag[1:]}" if default is not False else flag]
    option = typer.Option(*flags, help=entry.help, metavar=entry.metavar, show_default=entry.unset or True)
    annotation = Annotated[chosen if default is not None else chosen | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
