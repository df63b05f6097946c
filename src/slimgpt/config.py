"""The settings of a run, checked before anything long begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from slimgpt.errors import UsageError
from slimgpt.runtime.settings import documents_settings, run_checks, setting
from slimgpt.runtime.units import CacheTarget, parse_cache, parse_count, parse_size

ALLOCATIONS = ("auto", "schedule", "sensitivity", "search")
SEEDS = 2**63
"""Seeds are below it: a seed is a 64-bit number with a sign."""

BOTH = ("prune", "plan")
"""The commands with an option for whatever decides the widths or what they cost."""


# Checks of one setting


def check_at_least_one(name: str, value: int) -> None:
    """Refuse a count below one."""
    if value < 1:
        raise UsageError(f"{name} is {value}; it must be at least 1")


def check_damping(name: str, value: float) -> None:
    """Refuse a damping below zero or without bound."""
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{name} is {value}; it must be 0 or more (the paper uses 0 to 0.01)")


def check_share(name: str, value: float) -> None:
    """Refuse what is no share."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name} is {value}; it is a share between 0 and 1")


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that generators do not take.

    Raises:
        UsageError: it is below 0, or takes more than 63 bits.
    """
    if value < 0:
        raise UsageError(f"{name} is {value}; it must be 0 or more")
    if value >= SEEDS:
        raise UsageError(f"{name} is {value}; it must be below 2**63; give a smaller number")


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


@dataclass(frozen=True)
class PruneConfig:
    """How to prune.

    Args:
        **settings: one line each, from the fields below.

    Raises:
        UsageError: a value outside its range, or settings that exclude each other.
    """

    ratio: float | None = setting(
        None,
        "Share of the decoder layers' parameters to remove.",
        detail="In (0, 1), or the mean of a listed schedule.",
        unset="0.2",
        commands=BOTH,
    )
    schedule: str | tuple[float, ...] | None = setting(
        None,
        "log_increase, linear_increase, uniform, log_decrease, linear_decrease, or a ratio per layer: a,b,c.",
        unset="log_increase",
        commands=BOTH,
    )
    method: str = setting(
        "slimgpt", "slimgpt, paper, paper-no-gcd, paper-no-dgs, magnitude, wanda or random.", commands=BOTH
    )
    repair: bool | None = setting(None, "Solve for the weights that stay.", unset="as the method")
    head_unit: str = setting(
        "auto",
        "kv: KV heads with their query heads; query: query heads, equally many per KV head.",
        detail="auto: whole KV heads for the paper's methods, else query heads where several share a KV head.",
        commands=BOTH,
    )
    num_samples: int = setting(128, "Calibration windows.", check=check_at_least_one, commands=BOTH)
    seq_len: int = setting(2048, "Tokens per window.", check=check_at_least_one, commands=BOTH)
    batch_size: int = setting(4, "Windows that go through a layer together.", check=check_at_least_one)
    damping: float = setting(0.01, "Share of the mean diagonal added to the Hessian's diagonal.", check=check_damping)
    seed: int = setting(
        0,
        "For the choice of text.",
        detail="Also for the method random and for text that is generated.",
        check=check_seed,
    )
    round_to: int = setting(
        1, "FFN widths become multiples of it.", unset="1, or as --for asks", check=check_at_least_one, commands=BOTH
    )
    uniform: bool = setting(False, "The same widths in all layers: loads as a stock class.", commands=BOTH)
    forward_dtype: str = setting(
        "auto",
        "Type of the passes over calibration tokens: auto (as stored; on a CPU the faster one), float32, float16, "
        "bfloat16.",
        detail="Weights are scored, repaired and saved in their own type whatever it is.",
    )
    params: str | int | None = setting(
        None,
        "Parameters that the whole model may have, such as 1.0B; in place of a ratio.",
        detail="Never exceeded.",
        commands=BOTH,
    )
    bytes: str | int | None = setting(
        None,
        "Bytes that its weights may take on disk, such as 800MB; in place of a ratio.",
        detail="Never exceeded.",
        commands=BOTH,
    )
    kv_cache: str | None = setting(
        None,
        "What its KV cache may take at a context, such as 1GB@32k.",
        detail="Whole KV heads go until it fits.",
        commands=BOTH,
    )
    allocation: str = setting(
        "auto",
        "schedule: as the schedule says; sensitivity: where it costs least, measured on a trial run; search: measured "
        "at more points, then trained eight times as long; auto: sensitivity for the method slimgpt if the text is "
        "enough.",
        detail="A search compares with the schedule's plan, and its training moves all matrices, mostly on text that "
        "the dense model writes. With a schedule, a plan or equal widths, auto is schedule.",
        check=check_allocation,
    )
    plan: str | None = setting(
        None, "A file that `slimgpt plan --save` wrote.", detail="In place of every other choice of widths."
    )
    whole_experts: float = setting(
        0.0,
        "Mixtures: the share of what experts lose that is taken as whole experts, from 0 to 1.",
        detail="The rest is channels inside the experts that stay.",
        check=check_share,
        commands=BOTH,
    )
    distill: str | int = setting(
        "auto",
        "Train output matrices and norms together on so many calibration tokens afterwards, towards what the dense "
        "model predicts and the text says, or off; auto: as many as cost 1.4 forward passes (11.5 in a search) over "
        "all, for the method slimgpt if the text is enough. If the text has fewer, the dense model generates the rest.",
        detail="With auto, not at all for the other methods, without repair, and for mixtures of experts.",
        metavar="TOKENS",
        check=check_distill,
    )

    evaluate: bool = setting(
        True,
        "Measure at the end how far the predictions are from the dense model's.",
        detail="KL divergence, same most likely token and perplexity before and after, on text held out of the "
        "calibration and on a bundled one: two passes over some thousand tokens.",
    )

    def __post_init__(self) -> None:
        run_checks(self)
        _ = self.param_limit, self.byte_limit, self.cache_target  # parsed here, once
        check_one_size(self)
        check_plan_file(self)
        object.__setattr__(self, "allocation", allocation_of(self))
        check_measured_allocation(self)
        object.__setattr__(self, "distill", distill_of(self))

    @cached_property
    def param_limit(self) -> int | None:
        """``params`` as a number."""
        return None if self.params is None else parse_count(self.params)

    @cached_property
    def byte_limit(self) -> int | None:
        """``bytes`` as a number."""
        return None if self.bytes is None else parse_size(self.bytes)

    @cached_property
    def cache_target(self) -> CacheTarget | None:
        """``kv_cache`` as bytes and context."""
        return None if self.kv_cache is None else parse_cache(self.kv_cache)


documents_settings(PruneConfig)


# Checks of settings that depend on each other


def sizes_given(config: PruneConfig) -> list[str]:
    """The settings that say how small the model shall be."""
    return [name for name in ("ratio", "params", "bytes", "plan") if getattr(config, name) is not None]


def check_one_size(config: PruneConfig) -> None:
    """Refuse two sizes."""
    sizes = sizes_given(config)
    if len(sizes) > 1:
        raise UsageError(f"{' and '.join(sizes)} were given; each says how small the model shall be: give one")


def check_plan_file(config: PruneConfig) -> None:
    """Refuse a choice of widths beside a file of widths."""
    unit = config.head_unit != "auto"
    free = (config.schedule, unit, config.kv_cache, config.uniform, config.round_to != 1, config.whole_experts)
    if config.plan is not None and any(free):
        raise UsageError(
            "a plan file says every width; leave out schedule, head_unit, kv_cache, whole_experts, and uniform and "
            "round_to, which engines named with --for may set"
        )


def cache_alone(config: PruneConfig) -> bool:
    """Whether a KV cache is limited and nothing else."""
    return config.kv_cache is not None and not sizes_given(config)


def allocation_of(config: PruneConfig) -> str:
    """The allocation, with ``schedule`` for an ``auto`` that nothing can be measured for."""
    measured = config.method == "slimgpt" and not (config.schedule or config.plan or config.uniform)
    if config.allocation == "auto" and (not measured or cache_alone(config)):
        return "schedule"
    return config.allocation


def check_measured_allocation(config: PruneConfig) -> None:
    """Refuse to measure where the widths are given, or where no size is."""
    if config.allocation not in ("sensitivity", "search"):
        return
    if config.schedule or config.plan or config.uniform:
        raise UsageError(
            f"allocation '{config.allocation}' chooses the widths itself; leave out schedule, plan and uniform"
        )
    if cache_alone(config):
        raise UsageError(
            f"allocation '{config.allocation}' spends a size, and kv_cache alone names none; add ratio, params or bytes"
        )


def distill_of(config: PruneConfig) -> str | int:
    """The tokens to train on, with 0 for ``off`` and for an ``auto`` that trains nothing; or ``auto``."""
    if config.distill != "auto":
        return 0 if config.distill == "off" else int(config.distill)
    return 0 if config.method != "slimgpt" or config.repair is False else "auto"


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


def make_config(**settings: Any) -> PruneConfig:
    """Settings, with the method checked.

    Raises:
        UsageError: a value outside its range or an unknown method.
    """
    from slimgpt.solver import CRITERIA  # imports torch, which `--help` does without

    schedule = settings.get("schedule")
    if isinstance(schedule, str):
        settings["schedule"] = parse_schedule(schedule)
    elif schedule is not None:
        settings["schedule"] = tuple(schedule)
    config = PruneConfig(**settings)
    if config.method not in CRITERIA:
        raise UsageError(f"method '{config.method}' is unknown; choose {', '.join(CRITERIA)}")
    return config
