"""Checks of one setting by itself: each takes its name and value, and raises what is wrong with it."""

from __future__ import annotations

import math

from slimgpt.errors import PlanError, UsageError

AUTO = "auto"
"""The value of settings that are chosen by the model and the text."""

ALLOCATIONS = (AUTO, "schedule", "sensitivity", "search")
TIMED_ENGINES = ("transformers", "vllm", "llama.cpp")
DTYPES = ("float32", "float16", "bfloat16")
SCHEDULES = ("log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease")
"""The keys of :data:`slimgpt.planning.RATIOS`, whose package imports torch."""

HEAD_UNITS = (AUTO, "kv", "query")
SEEDS = 2**63
"""Seeds are below it: a seed is a 64-bit number with a sign."""


def check_at_least_one(name: str, value: int | None) -> None:
    """Refuse a count below one."""
    if value is not None and value < 1:
        raise UsageError(f"{name} is {value}; it must be at least 1")


def check_positive(name: str, value: float | None) -> None:
    """Refuse what is not above 0, or without bound."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} is {value}; it must be more than 0")


def check_not_negative(name: str, value: float) -> None:
    """Refuse what is below 0, or no number."""
    if not value >= 0:
        raise UsageError(f"{name} is {value}; it must be 0 or more")


def check_ratio(name: str, value: float | None) -> None:
    """Refuse what is no share above 0 and below 1."""
    if value is None or 0 < value < 1:
        return
    hint = f"; did you mean {value / 100:g}?" if 1 <= value < 100 else ""
    raise UsageError(f"{name} {value:g} is outside (0, 1): it is the share of the decoder layers to remove{hint}")


def check_round_to(name: str, value: int | str) -> None:
    """Refuse what is neither ``auto`` nor a number of at least one."""
    if value == AUTO:
        return
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise UsageError(f"{name} is {value}; it must be {AUTO} or a number of at least 1")


def check_num_widths(name: str, value: int | None) -> None:
    """Refuse fewer than two widths."""
    if value is not None and value < 2:
        raise UsageError(f"{name} is {value}; it must be at least 2 (uniform: one width for all layers)")


def check_damping(name: str, value: float) -> None:
    """Refuse a damping below zero or without bound."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} is {value}; it must be 0 or more (the paper uses 0 to 0.01)")


def check_share(name: str, value: float) -> None:
    """Refuse what is no share."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}; it is a share between 0 and 1")


def check_whole_experts(name: str, value: float | str) -> None:
    """Refuse what is neither ``auto`` nor a share."""
    if value == AUTO:
        return
    try:
        share = float(value)
    except ValueError:
        raise UsageError(f"{name} is {value}; it must be {AUTO} or a share between 0 and 1") from None
    check_share(name, share)


def check_share_below_one(name: str, value: float) -> None:
    """Refuse what is no share, or all."""
    if not 0 <= value < 1:
        raise UsageError(f"{name} is {value}; it must be in [0, 1)")


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that generators do not take.

    Raises:
        UsageError: it is below 0, or takes more than 63 bits.
    """
    if value < 0:
        raise UsageError(f"{name} is {value}; it must be 0 or more")
    if value >= SEEDS:
        raise UsageError(f"{name} is {value}; it must be below 2**63; give a smaller number")


def check_speedup(name: str, value: float | None) -> None:
    """Refuse what is no factor above 1."""
    if value is not None and not (math.isfinite(value) and value > 1):
        raise UsageError(f"{name} is {value:g}; it must be more than 1: how many times as fast, such as 1.5")


def check_engine(name: str, value: str) -> None:
    """Refuse an engine that no table of times is for."""
    if value not in TIMED_ENGINES:
        raise UsageError(f"{name} '{value}' is unknown; choose {', '.join(TIMED_ENGINES)}")


def check_schedule(name: str, value: str | tuple[float, ...] | None) -> None:
    """Refuse an unknown rule; a list of ratios is checked once the number of layers is known."""
    if isinstance(value, str) and value not in SCHEDULES:
        raise PlanError(
            f"{name} '{value}' is unknown; choose {', '.join(SCHEDULES)}, or give one ratio per layer: a,b,c"
        )


def check_head_unit(name: str, value: str) -> None:
    """Refuse an unknown unit of heads."""
    if value not in HEAD_UNITS:
        raise PlanError(f"{name} '{value}' is unknown; choose {', '.join(HEAD_UNITS)}")


def check_dtype(name: str, value: str) -> None:
    """Refuse what is neither ``auto`` nor a type of numbers."""
    if value != AUTO and value not in DTYPES:
        raise UsageError(f"{name} '{value}' is unknown; choose {AUTO}, {', '.join(DTYPES)}")


def check_allocation(name: str, value: str) -> None:
    """Refuse an unknown allocation."""
    if value not in ALLOCATIONS:
        raise UsageError(f"{name} '{value}' is unknown; choose {', '.join(ALLOCATIONS)}")


def check_distill(name: str, value: str | int) -> None:
    """Refuse what is no number of tokens, ``auto`` or ``off``."""
    if value in ("auto", "off"):
        return
    try:
        refused = int(value) < 0
    except ValueError:
        refused = True
    if refused:
        raise UsageError(f"{name} is {value}; it must be auto, off, or a number of tokens")
