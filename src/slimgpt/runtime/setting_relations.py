"""Checks of settings against each other, and values that follow from others; each takes all settings of a run."""

from __future__ import annotations

from typing import Any

from slimgpt.errors import UsageError
from slimgpt.runtime.setting_checks import AUTO


def sizes_given(config: Any) -> list[str]:
    """The settings that say how small the model shall be."""
    return [name for name in ("ratio", "params", "bytes", "speedup", "plan") if getattr(config, name) is not None]


def check_one_size(config: Any) -> None:
    """Refuse two sizes."""
    sizes = sizes_given(config)
    if len(sizes) > 1:
        raise UsageError(f"{' and '.join(sizes)} were given; each says how small or fast the model shall be: give one")


def check_plan_file(config: Any) -> None:
    """Refuse a choice of widths beside a file of widths."""
    unit, step = config.head_unit != AUTO, str(config.round_to) not in (AUTO, "1")
    free = (config.schedule, unit, config.kv_cache, config.uniform, step, given_whole_experts(config))
    if config.plan is not None and (any(free) or config.num_widths is not None):
        raise UsageError(
            "a plan file says every width; leave out schedule, head_unit, kv_cache, whole_experts, num_widths, and "
            "uniform and round_to, which engines named with --for may set"
        )


def check_speed(config: Any) -> None:
    """Refuse what else decides how much is removed beside a speed, and how a speed is timed where none is asked for."""
    if config.speedup is None:
        timed = {"on": "transformers", "batch": 1, "prompt": 512, "new_tokens": 128, "speed_table": None}
        given = [name for name, default in timed.items() if getattr(config, name) != default]
        if given:
            raise UsageError(f"{given[0]} says how a speedup is timed, and none is asked for; add speedup")
        return
    if config.kv_cache is not None:
        raise UsageError("speedup and kv_cache both decide how many heads go; leave one of them out")
    if config.schedule is not None and not isinstance(config.schedule, str):
        raise UsageError("a list of ratios says how much goes, and speedup says so too; leave one of them out")
    if given_whole_experts(config) or config.method == "reap":
        raise UsageError("speedup times heads and channels, and whole experts have no times; leave one of them out")


def check_kept(config: Any) -> None:
    """Refuse settings that keep what others remove."""
    if config.ffn_only and config.heads_only:
        raise UsageError("ffn_only and heads_only exclude each other; leave one of them out")
    if config.ffn_only and config.kv_cache is not None:
        raise UsageError("kv_cache removes KV heads, and ffn_only keeps them; leave one of them out")
    if config.heads_only and (given_whole_experts(config) or config.method == "reap"):
        subject = "method reap" if config.method == "reap" else "whole_experts"
        raise UsageError(f"{subject} removes experts, and heads_only keeps them; leave one of them out")
    if config.uniform and config.num_widths is not None:
        raise UsageError(
            "num_widths lets layers differ, and uniform keeps them equal (--for an engine of equal layers sets it); "
            "leave one of them out"
        )
    if config.uniform and config.skip_layers:
        raise UsageError("skip_layers makes layers differ, and uniform keeps them equal; leave one of them out")
    if config.plan is not None and (config.ffn_only or config.heads_only or config.skip_layers):
        raise UsageError("a plan file says every width; leave out ffn_only, heads_only and skip_layers")


def cache_alone(config: Any) -> bool:
    """Whether a KV cache is limited and nothing else."""
    return config.kv_cache is not None and not sizes_given(config)


def allocation_of(config: Any) -> str:
    """The allocation, with ``schedule`` for an ``auto`` that nothing can be measured for."""
    measured = config.method == "slimgpt" and not (config.schedule or config.plan)
    if config.allocation == "auto" and config.drop_attention:
        return "sensitivity"
    if config.allocation == "auto" and (not measured or cache_alone(config)):
        return "schedule"
    return config.allocation


def check_measured_allocation(config: Any) -> None:
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
        subject = "drop_attention" if config.drop_attention else f"allocation '{config.allocation}'"
        raise UsageError(f"{subject} spends a size, and kv_cache alone names none; add ratio, params or bytes")


def given_whole_experts(config: Any) -> float:
    """The share of whole experts as far as the settings say it: 0 where it is ``auto``."""
    return 0.0 if config.whole_experts == AUTO else float(config.whole_experts)


def whole_experts_of(config: Any) -> str | float:
    """The share of whole experts, or ``auto``; REAP knows nothing else to remove."""
    if config.method == "reap" and config.plan is None:
        return 1.0
    return AUTO if config.whole_experts == AUTO else given_whole_experts(config)


def distill_of(config: Any) -> str | int:
    """The tokens to train on, with 0 for ``off`` and for an ``auto`` that trains nothing; or ``auto``."""
    if config.distill != "auto":
        return 0 if config.distill == "off" else int(config.distill)
    return 0 if config.method != "slimgpt" or config.repair is False else "auto"
