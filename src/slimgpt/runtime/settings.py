"""A setting is one line: a field of a dataclass that knows its help text, its option and its check."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])
Check = Callable[[str, Any], None]
"""Called with a setting's name and value; raises what is wrong with it."""

_MARK = re.compile(r"^( *)\*\*settings:.*(?:\n\1 .*)*", re.MULTILINE)
_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """Metadata of a setting besides its name, type and default.

    Args:
        help: one sentence or two for the command line and the documentation.
        detail: what the documentation adds.
        unset: what holds when it is not given; its option then has no default of its own.
        metavar: what the command line calls the value.
        check: refuses a value by itself.
        commands: those that have an option for it.
    """

    help: str
    detail: str = ""
    unset: str | None = None
    metavar: str | None = None
    check: Check | None = None
    commands: tuple[str, ...] = ("prune",)

    def text(self, default: Any) -> str:
        """The documentation of a setting with a default, in one paragraph."""
        name = any(letter.isupper() for letter in self.help.split()[0][1:])  # LoRA, FFN
        start = self.help if name else self.help[0].lower() + self.help[1:]
        unset = f"If not given: {self.unset}." if self.unset and default is None else ""
        return " ".join(part for part in (start, self.detail, unset) if part)


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass of settings; ``more`` are the other arguments of :class:`Setting`."""
    return field(default=default, metadata={_KEY: Setting(help, **more)})


def settings_of(owner: type, command: str | None = None) -> dict[str, Setting]:
    """The settings that a dataclass has, by name and in order.

    Args:
        command: those with an option of this command alone.
    """
    all_settings = {entry.name: entry.metadata[_KEY] for entry in fields(owner) if _KEY in entry.metadata}
    return {name: entry for name, entry in all_settings.items() if command is None or command in entry.commands}


def run_checks(values: Any) -> None:
    """Check every setting of an instance by itself.

    Raises:
        UsageError: a value that its check refuses.
    """
    for name, entry in settings_of(type(values)).items():
        if entry.check is not None:
            entry.check(name, getattr(values, name))


def interleave(
    own: Iterable[inspect.Parameter], settings: Mapping[str, inspect.Parameter], before: Mapping[str, str]
) -> list[inspect.Parameter]:
    """The written parameters of a function with settings between them.

    Args:
        own: what is written, without ``**settings``.
        settings: by name; one that is written is left out.
        before: which settings stand before which written parameter, as names with spaces between them. Settings that
            no entry names stand before the last of these parameters.
    """
    own = list(own)
    written = {parameter.name for parameter in own}
    places = {place: names.split() for place, names in before.items()}
    listed = {name for names in places.values() for name in names}
    places[list(places)[-1]] += [name for name in settings if name not in listed | written]
    parameters: list[inspect.Parameter] = []
    for parameter in own:
        parameters += [settings[name] for name in places.get(parameter.name, [])]
        parameters.append(parameter)
    return parameters


def has_settings(
    owner: type, before: Mapping[str, str], command: str | None = None
) -> Callable[[Documented], Documented]:
    """Give a function that takes ``**settings`` the keywords and the documentation of the settings.

    Args:
        owner: the dataclass of settings.
        before: where they stand; see :func:`interleave`.
        command: the settings of this command alone.
    """
    types = {entry.name: (entry.type, entry.default) for entry in fields(owner)}

    def decorate(function: Documented) -> Documented:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        keywords = {
            name: inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=types[name][1], annotation=types[name][0]
            )
            for name in settings_of(owner, command)
        }
        signature = inspect.signature(function).replace(parameters=interleave(own, keywords, before))
        function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        function.__doc__ = documented(function.__doc__, owner, command)
        return function

    return decorate


def documented(text: str | None, owner: type, command: str | None = None) -> str | None:
    """A docstring with the documentation of every setting in place of its entry ``**settings``."""

    def lines(match: re.Match[str]) -> str:
        return "\n".join(
            textwrap.fill(
                f"{name}: {entry.text(getattr(owner, name))}",
                120,
                initial_indent=match[1],
                subsequent_indent=f"{match[1]}    ",
            )
            for name, entry in settings_of(owner, command).items()
        )

    return text and _MARK.sub(lines, text)


def documents_settings(owner: type) -> None:
    """Put the documentation of every setting into the docstring of their dataclass."""
    owner.__doc__ = documented(owner.__doc__, owner)
