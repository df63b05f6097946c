"""Sizes as people write them: 1.0B parameters, 8GB, 1GB@32k."""

from __future__ import annotations

import re

from slimgpt.errors import PlanError, UsageError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes from ``8GB``, ``1.5 GiB``, ``800MB`` or a plain number.

    Raises:
        UsageError: anything else, or not above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]i?)?b?\s*", text.lower())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"'{text}' is no amount of memory; give for example 8GB, 1.5GiB or 800MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}


_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def parse_count(text: str | int) -> int:
    """A number of parameters from ``1.0B``, ``350M``, ``1_000_000`` or a plain number.

    Raises:
        PlanError: anything else, or not above zero.
    """
    return _parse(str(text), r"([kmbt]?)", _DECIMAL, "number of parameters", "1.0B, 350M or 1000000")


def parse_size(text: str | int) -> int:
    """Bytes from ``800MB``, ``1.5GiB`` or a plain number.

    Raises:
        PlanError: anything else, or not above zero.
    """
    return _parse(str(text), r"([kmgt]i?)?b?", _BYTES, "size in bytes", "800MB, 1.5GiB or 1000000")


def _parse(text: str, suffix: str, units: dict[str, int], what: str, examples: str) -> int:
    match = re.fullmatch(rf"\s*([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)\s*{suffix}\s*", text.lower())
    value = float(match[1].replace("_", "")) * units[match[2] or ""] if match else 0.0
    if value < 1:
        raise PlanError(f"'{text}' is no {what}; give for example {examples}")
    return int(value)
