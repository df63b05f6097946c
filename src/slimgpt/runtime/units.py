"""Sizes and lists as people write them: 1.0B parameters, 8GB, 1GB@32k, layers 0,1,-1."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from slimgpt.errors import UsageError

_NUMBER = r"([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_UNITS |= {f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("kmgt", start=1)}


@dataclass(frozen=True)
class CacheTarget:
    """At most so many bytes of KV cache for a context of so many tokens."""

    bytes: int
    context: int


def parse_count(text: str | int) -> int:
    """A number of parameters from ``1.0B``, ``350M``, ``1_000_000`` or a plain number.

    Raises:
        UsageError: anything else, or not above zero.
    """
    return _parse(text, r"([kmbt]?)", "number of parameters", "1.0B, 350M or 1000000")


def parse_size(text: str | int, subject: str = "size in bytes", examples: str = "800MB, 1.5GiB or 1000000") -> int:
    """Bytes from ``800MB``, ``1.5GiB`` or a plain number.

    Args:
        subject: noun the error calls it by.
        examples: valid values for the error.

    Raises:
        UsageError: anything else, or less than one byte.
    """
    return _parse(text, r"([kmgt]i?)?b?", subject, examples)


def parse_bytes(text: str) -> int:
    """Bytes of memory from ``8GB``, ``1.5 GiB``, ``800MB`` or a plain number.

    Raises:
        UsageError: anything else, or less than one byte.
    """
    return parse_size(text, "amount of memory", "8GB, 1.5GiB or 800MB")


def parse_cache(text: str) -> CacheTarget:
    """A limit of the KV cache from ``1GB@32k``: bytes at a context of tokens.

    Raises:
        UsageError: anything else.
    """
    size, at, context = text.partition("@")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)(k?)\s*", context.lower())
    if not at or not match or float(match[1]) <= 0:
        raise UsageError(f"'{text}' is no limit of a KV cache; give bytes and context, for example 1GB@32k")
    return CacheTarget(parse_size(size), int(float(match[1]) * (1024 if match[2] else 1)))


def parse_layers(layers: str | Iterable[int] | None) -> tuple[int, ...] | None:
    """Layers from the command line, such as ``0,1,-1``, or from Python.

    Raises:
        UsageError: something in it is no whole number.
    """
    if layers is None:
        return None
    try:
        parts = layers.split(",") if isinstance(layers, str) else layers
        return tuple(int(part) for part in parts) or None
    except (TypeError, ValueError):
        raise UsageError(f"skip_layers '{layers}' is no list of layers such as 0,1,-1") from None


def parse_schedule(text: str | None) -> str | tuple[float, ...] | None:
    """A schedule from the command line: a name, or numbers with commas between them.

    Raises:
        UsageError: a list with something in it that is no number, or with nothing in it.
    """
    if text is None or "," not in text:
        return text
    try:
        ratios = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        ratios = ()
    if not ratios:
        raise UsageError(f"schedule '{text}' is neither a name nor a list of numbers such as 0.1,0.2,0.3")
    return ratios


def _parse(text: str | int, suffix: str, subject: str, examples: str) -> int:
    match = re.fullmatch(rf"\s*{_NUMBER}\s*{suffix}\s*", str(text).lower())
    value = float(match[1].replace("_", "")) * _UNITS[match[2] or ""] if match else 0.0
    if value < 1:
        raise UsageError(f"'{text}' is no {subject}; give for example {examples}")
    return int(value)
