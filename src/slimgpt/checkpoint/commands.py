"""The commands that made a slim model, from its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slimgpt import assets
from slimgpt.calibration.documents import IN_MEMORY
from slimgpt.models.families.moe import EXPERTS
from slimgpt.planning.speed_table import SPEED_TABLE_FILE
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.setting_checks import AUTO
from slimgpt.runtime.setting_relations import given_whole_experts


def commands(report: PruneReport) -> list[str]:
    """The commands that made a model: of its pruning, then of every training after it, each over several lines.

    Of local files and folders only their own names are in them.
    """
    return [_prune_command(report), *(_recover_command(run) for run in report.recovery)]


def _prune_command(report: PruneReport) -> str:
    settings, calibration = report.settings, report.calibration
    targets = {name: getattr(settings, name) for name in ("params", "bytes", "plan", "kv_cache")}
    size = {name.replace("_", "-"): value for name, value in targets.items() if value is not None}
    if settings.plan is not None:
        size["plan"] = Path(settings.plan).name
    if settings.speedup is not None:
        size = {"speedup": f"{settings.speedup:g}", "on": settings.on, "batch": settings.batch}
        size |= {"prompt": settings.prompt, "new-tokens": settings.new_tokens, "speed-table": SPEED_TABLE_FILE}
    if not size or (set(size) == {"kv-cache"} and settings.ratio is not None):
        size["ratio"] = f"{report.plan.ratio:.6g}"
    options = {
        **size,
        "method": settings.method,
        "allocation": settings.allocation,
        "distill": settings.distill or "off",
        "head-unit": report.plan.head_unit,
        "calibration": public_calibration(calibration),
        "num-samples": calibration["num_samples"],
        "seq-len": calibration["seq_len"],
        "damping": f"{settings.damping:g}",
        "seed": settings.seed,
        "round-to": report.plan.round_to if settings.round_to == AUTO else settings.round_to,
    }
    if settings.num_widths is not None:
        options["num-widths"] = settings.num_widths
    if settings.whole_experts != AUTO and any(EXPERTS in sizes for sizes in report.plan.layers):
        options["whole-experts"] = f"{given_whole_experts(settings):g}"
    if settings.schedule is not None:
        names = settings.schedule if isinstance(settings.schedule, str) else map(str, settings.schedule)
        options["schedule"] = names if isinstance(names, str) else ",".join(names)
    words = [f"--{name} {shlex.quote(str(value))}" for name, value in options.items()]
    words += (
        ["--uniform"] * settings.uniform + ["--ffn-only"] * settings.ffn_only + ["--heads-only"] * settings.heads_only
    )
    words += ["--drop-attention"] * settings.drop_attention
    words += [f"--skip-layers={','.join(map(str, settings.skip_layers))}"] if settings.skip_layers else []
    words += [] if settings.evaluate else ["--no-evaluate"]
    words += [] if settings.repair is None else ["--repair" if settings.repair else "--no-repair"]
    model = assets.DEMO if report.base_model == assets.MODEL_NAME else public_name(report.base_model)
    return " \\\n    ".join([f"slimgpt prune {shlex.quote(model)} OUT", *words])


def public_calibration(calibration: Mapping[str, Any]) -> str:
    """A report's calibration source, or all sources of its mixture with their shares."""
    if "mixture" not in calibration:
        known = [calibration["dataset"]] if "dataset" in calibration else None
        return public_source(calibration["source"], known)
    parts = calibration["mixture"]
    return ",".join(f"{public_source(part['source'], [part['dataset']])}:{part['share']:g}" for part in parts)


def _recover_command(run: Mapping[str, Any]) -> str:
    """The command of one entry of a report's ``recovery``, with every setting as it was used."""
    settings, datasets = dict(run["settings"]), run["data"].get("datasets")
    sources = settings.pop("data", None) or run["data"]["sources"]
    words = [f"--data {shlex.quote(public_source(source, datasets))}" for source in sources]
    if run["execution"]["teacher"] is not None:
        words.append(f"--teacher {shlex.quote(public_name(run['execution']['teacher']))}")
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}"] if value else ["--no-bf16"] * (name == "bf16")
        elif isinstance(value, list | tuple):
            words.append(f"--{flag} {','.join(f'{number:g}' for number in value)}")
        elif value is not None:
            words.append(f"--{flag} {shlex.quote(f'{value:g}' if isinstance(value, float) else str(value))}")
    return " \\\n    ".join(["slimgpt recover SLIM OUT", *words])


def public_name(base: str) -> str:
    """The base model's name on one line; of a local folder only its own name, not where it lies."""
    local = base.startswith((".", "/", "~")) or base.count("/") > 1
    return " ".join((Path(base).expanduser().absolute().name if local else base).split())


def public_source(source: str, datasets: Sequence[str | None] | None) -> str:
    """A text's source; of a file or folder only its own name.

    Args:
        datasets: the ids of those on the hub; ``None`` where an older report does not tell.
    """
    if source in (assets.DEMO, *IN_MEMORY) or (datasets is not None and source.partition(":")[0] in datasets):
        return source
    return public_name(source) if datasets is None else Path(source).name
