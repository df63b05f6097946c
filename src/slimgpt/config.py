"""The settings of a run, checked before anything long begins."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from slimgpt.errors import UsageError
from slimgpt.runtime.setting_checks import (
    AUTO,
    check_allocation,
    check_at_least_one,
    check_damping,
    check_distill,
    check_ratio,
    check_round_to,
    check_seed,
    check_whole_experts,
)
from slimgpt.runtime.settings import documents_settings, run_checks, setting
from slimgpt.runtime.units import CacheTarget, parse_cache, parse_count, parse_layers, parse_schedule, parse_size

METHODS = ("slimgpt", "paper", "paper-no-gcd", "paper-no-dgs", "magnitude", "wanda", "reap", "random")
"""The keys of :data:`slimgpt.solver.CRITERIA`, which imports torch."""

BOTH = ("prune", "plan")
"""The commands with an option for whatever decides the widths or what they cost."""

RUNS = ("prune", "scan")
"""The commands that prune."""

ALL = ("prune", "plan", "scan")


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
        check=check_ratio,
        unset="0.2",
        commands=BOTH,
    )
    schedule: str | tuple[float, ...] | None = setting(
        None,
        "By rule: log_increase, uniform, ..., or a ratio per layer: a,b,c.",
        detail="The rules: log_increase (the paper's Incremental Pruning Ratio), linear_increase, uniform, "
        "log_decrease, linear_decrease.",
        unset="log_increase",
        commands=ALL,
    )
    method: str = setting(
        "slimgpt",
        "slimgpt, paper, paper-no-gcd, paper-no-dgs, magnitude, wanda, random, or reap: whole experts of mixtures.",
        commands=ALL,
    )
    repair: bool | None = setting(None, "Solve for the weights that stay.", unset="as the method", commands=RUNS)
    head_unit: str = setting(
        "auto",
        "auto, kv (KV heads with their query heads) or query.",
        detail="query: query heads, equally many per KV head. auto: whole KV heads for the paper's methods, else "
        "query heads where several share a KV head.",
        commands=ALL,
    )
    num_samples: int = setting(128, "Calibration windows.", check=check_at_least_one, commands=ALL)
    seq_len: int = setting(2048, "Tokens per window.", check=check_at_least_one, commands=ALL)
    batch_size: int = setting(4, "Windows that go through a layer together.", check=check_at_least_one, commands=RUNS)
    damping: float = setting(
        0.01, "Share of its mean added to the Hessian's diagonal.", check=check_damping, commands=RUNS
    )
    seed: int = setting(
        0,
        "For the choice of text.",
        detail="Also for the method random and for text that is generated.",
        check=check_seed,
        commands=RUNS,
    )
    round_to: str | int = setting(
        AUTO,
        "FFN widths become multiples of it: auto or a number.",
        detail="auto: of 64 where every FFN has at least 4,096 channels, of 32 where it has at least 1,024, else 1; "
        "equal layers: of 64 from 1,024 on. With auto the step is halved until the target is met (within 0.2 points, "
        "equal layers 0.5). Methods other than slimgpt take 1, as published.",
        unset="auto, or as --for asks",
        metavar="STEP",
        check=check_round_to,
        commands=ALL,
    )
    uniform: bool = setting(False, "Equal layers: the result loads as a stock class.", commands=ALL)
    ffn_only: bool = setting(False, "Remove FFN channels and experts only.", commands=ALL)
    heads_only: bool = setting(False, "Remove attention heads only.", commands=ALL)
    drop_attention: bool = setting(
        False,
        "Layers may lose their whole attention, where it costs least.",
        detail="Each layer's attention is removed in turn from the pruned model of the trial run; plans with the "
        "cheapest ones gone are pruned on trial, and the plan of lowest divergence is taken, which may be one that "
        "keeps them all. Saves KV cache and time that narrower layers do not. Never the first layer, and not in "
        "equal layers.",
    )
    skip_layers: str | tuple[int, ...] | None = setting(
        None, "Layers that stay as they are: 0,1,-1 (from the end).", commands=ALL
    )
    forward_dtype: str = setting(
        "auto",
        "Of passes over the text: auto, float32, float16, bfloat16.",
        detail="auto: as stored; on a CPU the faster one. Weights are scored, repaired and saved in their own type "
        "whatever it is.",
        commands=RUNS,
    )
    params: str | int | None = setting(
        None,
        "In place of a ratio: parameters of the result, such as 1.0B.",
        detail="Of the whole model. Never exceeded.",
        commands=BOTH,
    )
    bytes: str | int | None = setting(
        None,
        "In place of a ratio: bytes of its weights, such as 800MB.",
        detail="Never exceeded.",
        commands=BOTH,
    )
    kv_cache: str | None = setting(
        None,
        "Limit of its KV cache at a context, such as 1GB@32k.",
        detail="Whole KV heads go until it fits.",
        commands=BOTH,
    )
    allocation: str = setting(
        "auto",
        "Which layers lose how much: auto, schedule, sensitivity, search.",
        detail="schedule: as the schedule says; sensitivity: where it costs least, measured on a trial run; search: "
        "measured at more points, then trained eight times as long; auto: sensitivity for the method slimgpt if the "
        "text is enough. A search compares with the schedule's plan, and its training moves all matrices, mostly on "
        "text that the dense model writes. With a schedule or a plan, auto is schedule. Equal layers: the numbers of "
        "heads and channels that cost least, summed over the layers.",
        check=check_allocation,
        commands=RUNS,
    )
    plan: str | None = setting(
        None, "A file that `slimgpt plan --save` wrote.", detail="In place of every other choice of widths."
    )
    whole_experts: str | float = setting(
        AUTO,
        "Mixtures: share of the loss taken as whole experts: auto, or 0 to 1.",
        detail="The share of what experts lose. The rest is channels inside the experts that stay. auto: where widths "
        "are measured, plans with 0, half and all of it are pruned on trial, with the heads and the shared expert or "
        "without, and the one that predicts text best is taken; else 0. With the method reap: 1.",
        metavar="SHARE",
        check=check_whole_experts,
        commands=ALL,
    )
    distill: str | int = setting(
        "auto",
        "Tokens of the short training after pruning: auto, off or a number.",
        detail="Output matrices, norms and routers are trained together on so many calibration tokens, towards what "
        "the dense model predicts and the text says. auto: as many as cost 1.4 forward passes (11.5 in a search) over "
        "all, for the method slimgpt if the text is enough. If the text has fewer, the dense model generates the "
        "rest. With auto, not at all for the other methods and without repair.",
        metavar="TOKENS",
        check=check_distill,
        commands=RUNS,
    )

    evaluate: bool = setting(
        True,
        "Measure what was lost when it is done.",
        detail="How far the predictions are from the dense model's: KL divergence, same most likely token and "
        "perplexity before and after, on text held out of the calibration and on a bundled one: two passes over some "
        "thousand tokens.",
    )

    def __post_init__(self) -> None:
        run_checks(self)
        _ = self.param_limit, self.byte_limit, self.cache_target  # parsed here, once
        check_one_size(self)
        check_plan_file(self)
        if self.round_to != AUTO:
            object.__setattr__(self, "round_to", int(self.round_to))
        object.__setattr__(self, "skip_layers", parse_layers(self.skip_layers))
        check_kept(self)
        object.__setattr__(self, "allocation", allocation_of(self))
        object.__setattr__(self, "whole_experts", whole_experts_of(self))
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
    unit, step = config.head_unit != AUTO, config.round_to not in (AUTO, 1)
    free = (config.schedule, unit, config.kv_cache, config.uniform, step, given_whole_experts(config))
    if config.plan is not None and any(free):
        raise UsageError(
            "a plan file says every width; leave out schedule, head_unit, kv_cache, whole_experts, and uniform and "
            "round_to, which engines named with --for may set"
        )


def check_kept(config: PruneConfig) -> None:
    """Refuse settings that keep what others remove."""
    if config.ffn_only and config.heads_only:
        raise UsageError("ffn_only and heads_only exclude each other; leave one of them out")
    if config.ffn_only and config.kv_cache is not None:
        raise UsageError("kv_cache removes KV heads, and ffn_only keeps them; leave one of them out")
    if config.heads_only and given_whole_experts(config):
        raise UsageError("whole_experts removes experts, and heads_only keeps them; leave one of them out")
    if config.uniform and config.skip_layers:
        raise UsageError("skip_layers makes layers differ, and uniform keeps them equal; leave one of them out")
    if config.plan is not None and (config.ffn_only or config.heads_only or config.skip_layers):
        raise UsageError("a plan file says every width; leave out ffn_only, heads_only and skip_layers")


def cache_alone(config: PruneConfig) -> bool:
    """Whether a KV cache is limited and nothing else."""
    return config.kv_cache is not None and not sizes_given(config)


def allocation_of(config: PruneConfig) -> str:
    """The allocation, with ``schedule`` for an ``auto`` that nothing can be measured for."""
    measured = config.method == "slimgpt" and not (config.schedule or config.plan)
    if config.allocation == "auto" and config.drop_attention:
        return "sensitivity"
    if config.allocation == "auto" and (not measured or cache_alone(config)):
        return "schedule"
    return config.allocation


def check_measured_allocation(config: PruneConfig) -> None:
    """Refuse to measure where the widths are given, or where no size is, and to drop attention where nothing is
    measured."""
    excluded = [name for name in ("uniform", "ffn_only", "schedule", "plan") if getattr(config, name)]
    excluded += ["allocation schedule"] if config.allocation == "schedule" else []
    excluded += [f"method {config.method}"] if config.method != "slimgpt" else []
    if config.drop_attention and excluded:
        engines = " (--for an engine of equal layers sets it)" if config.uniform else ""
        raise UsageError(
            "drop_attention chooses by measured costs which layers lose their attention, layer by layer; "
            f"leave out {excluded[0]}{engines}, or drop_attention"
        )
    if config.allocation not in ("sensitivity", "search"):
        return
    if config.schedule or config.plan:
        raise UsageError(f"allocation '{config.allocation}' chooses the widths itself; leave out schedule and plan")
    if cache_alone(config):
        raise UsageError(
            f"allocation '{config.allocation}' spends a size, and kv_cache alone names none; add ratio, params or bytes"
        )


def given_whole_experts(config: PruneConfig) -> float:
    """The share of whole experts as far as the settings say it: 0 where it is ``auto``."""
    return 0.0 if config.whole_experts == AUTO else float(config.whole_experts)


def whole_experts_of(config: PruneConfig) -> str | float:
    """The share of whole experts, or ``auto``; REAP knows nothing else to remove."""
    if config.method == "reap" and config.plan is None:
        return 1.0
    return AUTO if config.whole_experts == AUTO else given_whole_experts(config)


def distill_of(config: PruneConfig) -> str | int:
    """The tokens to train on, with 0 for ``off`` and for an ``auto`` that trains nothing; or ``auto``."""
    if config.distill != "auto":
        return 0 if config.distill == "off" else int(config.distill)
    return 0 if config.method != "slimgpt" or config.repair is False else "auto"


def make_config(**settings: Any) -> PruneConfig:
    """Settings, with the method checked.

    Raises:
        UsageError: a value outside its range or an unknown method.
    """
    schedule = settings.get("schedule")
    if isinstance(schedule, str):
        settings["schedule"] = parse_schedule(schedule)
    elif schedule is not None:
        settings["schedule"] = tuple(schedule)
    config = PruneConfig(**settings)
    if config.method not in METHODS:
        raise UsageError(f"method '{config.method}' is unknown; choose {', '.join(METHODS)}")
    return config
