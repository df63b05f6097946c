"""The settings of a run, checked before anything long begins."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from slimgpt.errors import UsageError
from slimgpt.runtime.setting_checks import (
    AUTO,
    check_allocation,
    check_at_least_one,
    check_damping,
    check_distill,
    check_dtype,
    check_engine,
    check_head_unit,
    check_num_widths,
    check_ratio,
    check_round_to,
    check_schedule,
    check_seed,
    check_speedup,
    check_whole_experts,
)
from slimgpt.runtime.setting_relations import (
    allocation_of,
    check_kept,
    check_measured_allocation,
    check_one_size,
    check_plan_file,
    check_speed,
    distill_of,
    whole_experts_of,
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
    """Settings of pruning.

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
        "Ratio of each layer: a rule (log_increase, uniform, ...) or a,b,c.",
        detail="The rules: log_increase (the paper's Incremental Pruning Ratio), linear_increase, uniform, "
        "log_decrease, linear_decrease.",
        check=check_schedule,
        unset="log_increase",
        commands=ALL,
    )
    method: str = setting(
        "slimgpt",
        "slimgpt, paper, paper-no-gcd, paper-no-dgs, magnitude, wanda, random, or reap (whole experts only).",
        commands=ALL,
    )
    repair: bool | None = setting(
        None, "Least-squares update of the kept weights.", unset="as the method", commands=RUNS
    )
    head_unit: str = setting(
        "auto",
        "auto, kv (KV heads with their query heads) or query.",
        detail="query: query heads, equally many per KV head. auto: whole KV heads for the paper's methods, else "
        "query heads where several share a KV head.",
        check=check_head_unit,
        commands=ALL,
    )
    num_samples: int = setting(128, "Number of calibration windows.", check=check_at_least_one, commands=ALL)
    seq_len: int = setting(2048, "Tokens per window.", check=check_at_least_one, commands=ALL)
    batch_size: int = setting(4, "Windows per forward pass of a layer.", check=check_at_least_one, commands=RUNS)
    damping: float = setting(
        0.01, "Damping of the Hessian, as a share of its mean diagonal.", check=check_damping, commands=RUNS
    )
    seed: int = setting(
        0,
        "Random seed.",
        detail="Of the calibration text, of the method random and of generated text.",
        check=check_seed,
        commands=RUNS,
    )
    round_to: str | int = setting(
        AUTO,
        "Make FFN widths multiples of this: auto or a number.",
        detail="auto: of 64 where every FFN has at least 4,096 channels, of 32 where it has at least 1,024, else 1; "
        "equal layers: of 64 from 1,024 on. With auto the step is halved until the target is met (within 0.2 points, "
        "equal layers 0.5). Methods other than slimgpt take 1, as published.",
        unset="auto, or as --for asks",
        metavar="STEP",
        check=check_round_to,
        commands=ALL,
    )
    uniform: bool = setting(False, "Same widths in all layers: loads as a stock class.", commands=ALL)
    num_widths: int | None = setting(
        None,
        "Widths in a few steps: at most so many FFN widths and numbers of heads.",
        detail="Layers are divided into groups of one width each, so that by what was measured these widths cost as "
        "little as possible. For engines that run widths by layer (llama.cpp, "
        "transformers; nemotron-nas for FFNs alone). Not for mixtures of experts.",
        unset="any number",
        check=check_num_widths,
        commands=ALL,
    )
    ffn_only: bool = setting(False, "Remove FFN channels and experts only.", commands=ALL)
    heads_only: bool = setting(False, "Remove attention heads only.", commands=ALL)
    drop_attention: bool = setting(
        False,
        "Let layers lose their whole attention where it costs least.",
        detail="Each layer's attention is removed in turn from the pruned model of the trial run; plans with the "
        "cheapest ones gone are pruned on trial, and the plan of lowest divergence is taken, which may be one that "
        "keeps them all. Saves KV cache and time that narrower layers do not. Never the first layer, and not in "
        "equal layers.",
    )
    skip_layers: str | tuple[int, ...] | None = setting(
        None, "Layers to leave unpruned: 0,1,-1 (from the end).", commands=ALL
    )
    forward_dtype: str = setting(
        "auto",
        "Type of forward passes: auto, float32, float16, bfloat16.",
        detail="auto: as stored; on a CPU, for weights of 16 bits or fewer, the faster of float32 and bfloat16. "
        "Weights are scored, repaired and saved in their own type whatever it is.",
        check=check_dtype,
        commands=RUNS,
    )
    params: str | int | None = setting(
        None,
        "Target in parameters instead of a ratio, such as 1.0B.",
        detail="Of the whole model. Never exceeded.",
        commands=BOTH,
    )
    bytes: str | int | None = setting(
        None,
        "Target in bytes of weights instead of a ratio: 800MB.",
        detail="Never exceeded.",
        commands=BOTH,
    )
    kv_cache: str | None = setting(
        None,
        "Limit of the KV cache at a context length: 1GB@32k.",
        detail="Whole KV heads go until it fits.",
        commands=BOTH,
    )
    speedup: float | None = setting(
        None,
        "In place of a ratio: how many times as fast, such as 1.5.",
        detail="The time of one request: a prompt and the tokens after it. Layers are timed at several widths on this "
        "machine, the widths are chosen by loss per millisecond, and the result is timed in turn with the dense model.",
        check=check_speedup,
        commands=BOTH,
    )
    on: str = setting(
        "transformers",
        "With a speedup: the engine, transformers, vllm or llama.cpp.",
        detail="transformers is timed here; for the others give a speed_table.",
        check=check_engine,
        commands=BOTH,
    )
    batch: int = setting(1, "With a speedup: prompts at once.", check=check_at_least_one, commands=BOTH)
    prompt: int = setting(512, "With a speedup: tokens per prompt.", check=check_at_least_one, commands=BOTH)
    new_tokens: int = setting(128, "With a speedup: tokens after it.", check=check_at_least_one, commands=BOTH)
    speed_table: str | None = setting(
        None,
        "With a speedup: a JSON file of times, measured and written if it is not there.",
        metavar="FILE",
        commands=BOTH,
    )
    allocation: str = setting(
        "auto",
        "How widths are chosen: auto, schedule, sensitivity, search.",
        detail="schedule: as the schedule says; sensitivity: where it costs least, measured on a trial run; search: "
        "measured at more points, then trained eight times as long; auto: sensitivity for the method slimgpt if the "
        "text is enough. A search compares with the schedule's plan, and its training moves all matrices, mostly on "
        "text that the dense model writes. With a schedule or a plan, auto is schedule. Equal layers: the numbers of "
        "heads and channels that cost least, summed over the layers.",
        check=check_allocation,
        commands=RUNS,
    )
    plan: str | None = setting(
        None, "Widths from a file of `slimgpt plan --save`.", detail="In place of every other choice of widths."
    )
    whole_experts: str | float = setting(
        AUTO,
        "MoE: share of the removed weights in whole experts: auto, or 0 to 1.",
        detail="Of what experts lose; the rest is channels inside the experts that stay. auto: where widths "
        "are measured, plans with 0, half and all of it are pruned on trial, with the heads and the shared expert or "
        "without, and the one that predicts text best is taken; else 0. With the method reap: 1.",
        metavar="SHARE",
        check=check_whole_experts,
        commands=ALL,
    )
    distill: str | int = setting(
        "auto",
        "Tokens of the distillation after pruning: auto, off or a number.",
        detail="Output matrices, norms and routers are trained together on so many calibration tokens, towards what "
        "the dense model predicts and the text says. auto: as many as cost 1.4 forward passes over the "
        "whole calibration text (search: 11.5; --uniform: up to 2.7, but no text beyond it), for the method slimgpt if "
        "the text is enough. If the text has fewer, the dense model generates the rest. With auto, not at all for the "
        "other methods and without repair.",
        metavar="TOKENS",
        check=check_distill,
        commands=RUNS,
    )

    evaluate: bool = setting(
        True,
        "Measure the divergence from the dense model at the end.",
        detail="KL divergence of the predictions, same most likely token and perplexity before and after, "
        "on text held out of the calibration and on a bundled one: two passes over some thousand tokens.",
    )

    def __post_init__(self) -> None:
        run_checks(self)
        _ = self.param_limit, self.byte_limit, self.cache_target  # parsed here, once
        check_one_size(self)
        check_plan_file(self)
        check_speed(self)
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


def make_config(**settings: Any) -> PruneConfig:
    """Settings, with their names and the method checked.

    Raises:
        UsageError: a value outside its range, an unknown name or an unknown method.
    """
    for name in settings:
        if name not in PruneConfig.__dataclass_fields__:
            near = get_close_matches(name, PruneConfig.__dataclass_fields__, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(PruneConfig.__dataclass_fields__)}"
            raise UsageError(f"pruning has no setting '{name}'; {hint}")
    schedule = settings.get("schedule")
    if isinstance(schedule, str):
        settings["schedule"] = parse_schedule(schedule)
    elif schedule is not None:
        settings["schedule"] = tuple(schedule)
    config = PruneConfig(**settings)
    if config.method not in METHODS:
        raise UsageError(f"method '{config.method}' is unknown; choose {', '.join(METHODS)}")
    return config
