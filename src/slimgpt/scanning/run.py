"""A scan: the model pruned to a few sizes in memory, and the losses of all others predicted from these."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.calibration.evaluation_text import FOR_PEOPLE
from slimgpt.calibration.mixture import AUTO
from slimgpt.calibration.windows import Calibration
from slimgpt.config import PruneConfig, make_config
from slimgpt.distillation.schedule import tokens_to_distill
from slimgpt.errors import NumericalError, PlanError, UsageError
from slimgpt.models.loading import load
from slimgpt.models.parameter_counts import ModelShape, describe
from slimgpt.pipeline.callbacks import Callbacks, OnPhase, by_phase, phase_bars
from slimgpt.pipeline.in_memory import job_in_memory, run_beside
from slimgpt.pipeline.stages import PruneJob
from slimgpt.planning.cost import generation_flops
from slimgpt.planning.plan import Plan
from slimgpt.planning.planner import plan_for
from slimgpt.planning.restriction import restricted
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.settings import has_settings, settings_of
from slimgpt.runtime.units import parse_bytes
from slimgpt.runtime.versions import versions
from slimgpt.scanning.points import Loss, ScanPoint
from slimgpt.scanning.prediction import LossPredictor, MeasuredSize, measured_size
from slimgpt.scanning.report import MAX_KL, ScanReport

SCANNED_RATIOS = tuple(number / 100 for number in range(5, 61, 5))
"""The sizes of the table."""

PRUNED = (1 / 6, 1 / 2, 11 / 12)
"""Where sizes are pruned to if none are given, as shares of the largest size that widths can have: 10, 30 and 55% of
60%."""

PROMPT_TOKENS, NEW_TOKENS = 512, 128
"""Tokens of the prompt, and new ones, that the promised speed is for; those of ``slimgpt speed``."""


@has_settings(PruneConfig, before={"device": "schedule method num_samples seq_len seed", "memory": ""}, command="scan")
def scan(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration = AUTO,
    *,
    points: Sequence[float] | None = None,
    max_kl: float = MAX_KL,
    device: str = "auto",
    dtype: str = "auto",
    memory: str | None = None,
    trust_remote_code: bool = False,
    on_phase: OnPhase | None = None,
    progress: bool = False,
    **settings: Any,
) -> ScanReport:
    """Costs and gains of removing 5 to 60%: KL divergence, agreement, expected speed, and the largest size in a bound.

    The model is pruned to a few sizes in memory, each as :func:`slimgpt.prune` does it, and is unchanged afterwards;
    nothing is written. Other sizes are predicted; see :class:`slimgpt.scanning.prediction.LossPredictor`.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, ``demo``, or a model in memory.
        tokenizer: of a model in memory.
        calibration: as for :func:`slimgpt.prune`.
        points: the ratios that are pruned to and measured, at least two; 0.1, 0.3 and 0.55 if not given, or less where
            no widths remove 60%.
        max_kl: the largest KL divergence that is recommended, in nats per token, on the bundled text; without that, on
            held-out calibration text.
        device: where layers run, one at a time.
        dtype: of the weights of a model that is loaded: ``auto`` (as stored), ``float32``, ``float16`` or ``bfloat16``.
        memory: what may be used on the device (on the CPU: by the process), such as ``8GB``.
        trust_remote_code: let config and tokenizer run Python code from the model's repository.
        **settings: the fields of :class:`slimgpt.config.PruneConfig`.
        on_phase: called after every step of every phase with the phase, the steps done and in all, the seconds it took,
            and what is known of it.
        progress: show a bar for every phase.

    Raises:
        UsageError: an argument outside its range, a setting that names a size, points that remove the same, or too
            little text.
        PlanError: no widths remove as much as one of ``points``.
        SlimGPTError: as :func:`slimgpt.prune`.
    """
    start = time.perf_counter()
    config = scan_config(points, max_kl, settings)
    if isinstance(model, PreTrainedModel):
        if dtype != "auto":
            raise UsageError(f"dtype '{dtype}' is for a model that is loaded by name; convert yours first")
        dense = model
    else:
        dense, tokenizer = load(str(model), dtype, "cpu", trust_remote_code)
    shape = restricted(describe(dense.config, dense), config)
    plans, omitted = table_plans(dense, config, shape)
    chosen = sorted(points) if points is not None else default_points(plans)
    targets = {ratio: plan_for(dense.config, replace(config, ratio=ratio), shape) for ratio in chosen}
    check_apart(targets)
    step = on_phase or (phase_bars() if progress else None)
    budget = parse_bytes(memory) if memory else None
    job = job_in_memory(
        dense,
        tokenizer,
        replace(config, ratio=chosen[0]),
        calibration,
        by_phase(step).prepare_step if step else None,
        device=device,
        budget=budget,
    )
    if not job.evaluation:
        raise UsageError("a scan compares predictions on text; give the tokenizer, and windows of at least 2 tokens")
    reports, failed = _prune_all(dense, job, targets, step, budget)
    for smallest, reason in failed.items():
        omitted = {f"{ratio:g}": reason for ratio in sorted({*plans, smallest}) if ratio >= smallest} | omitted
        plans = {ratio: plan for ratio, plan in plans.items() if ratio < smallest}
    texts = list(job.evaluation)
    sizes = {ratio: measured_size(report, texts) for ratio, report in reports.items()}
    predictor = LossPredictor(list(sizes.values()), shape, config, dense.config)
    rows = [_measured(dense, ratio, size, shape) for ratio, size in sizes.items()]
    rows += [
        _point(dense, ratio, widths, shape, predictor.losses(widths), measured=False)
        for ratio, plan in plans.items()
        if ratio not in sizes
        for widths in [predictor.plan(plan)]
    ]
    first = next(iter(reports.values()))
    return ScanReport(
        base_model=first.base_model,
        model_type=first.model_type,
        settings=job.config,
        parameters=shape.parameters,
        points=tuple(sorted(rows, key=lambda point: point.ratio)),
        text=next(name for name in FOR_PEOPLE if name in texts),
        max_kl=max_kl,
        texts={name: {key: first.divergence[name][key] for key in _OF_TEXT} for name in texts},
        calibration=first.calibration,
        prunings=tuple(_kept(ratio, report) for ratio, report in reports.items()),
        omitted=omitted,
        versions=versions(job.device),
        seconds=time.perf_counter() - start,
    )


_OF_TEXT = ("source", "windows", "window", "tokens", "sha256")


def scan_config(points: Sequence[float] | None, max_kl: float, settings: dict[str, Any]) -> PruneConfig:
    """The settings of all prunings, without a ratio.

    Raises:
        UsageError: an argument outside its range, or a setting that names a size.
    """
    if not (math.isfinite(max_kl) and max_kl > 0):
        raise UsageError(f"max_kl {max_kl} must be a number of nats above 0; {MAX_KL} if not given")
    if points is not None and (len(set(points)) < 2 or len(set(points)) < len(points)):
        raise UsageError(f"points {list(points)}: give at least two different ratios, such as 0.1,0.3,0.55")
    known = settings_of(PruneConfig, "scan")
    if other := [name for name in settings if name not in known]:
        raise UsageError(f"a scan has no setting {', '.join(other)}; it has {', '.join(known)}")
    config = make_config(**settings)
    if isinstance(config.schedule, tuple):
        raise UsageError("a schedule of numbers names one size, and a scan has many; give one by name")
    for ratio in points or ():
        replace(config, ratio=ratio)  # refuses one outside its range
    return config


def table_plans(
    model: PreTrainedModel, config: PruneConfig, shape: ModelShape
) -> tuple[dict[float, Plan], dict[str, str]]:
    """The plans of all sizes of the table without measuring, and the sizes that no widths can have, with the reason.

    Raises:
        PlanError: there is no plan of any size.
    """
    plans, omitted = {}, {}
    for ratio in SCANNED_RATIOS:
        try:
            plans[ratio] = plan_for(model.config, replace(config, ratio=ratio), shape)
        except PlanError as error:
            if ratio == SCANNED_RATIOS[-1] and not plans:
                raise
            omitted[f"{ratio:g}"] = str(error)
    return plans, omitted


def default_points(plans: dict[float, Plan]) -> list[float]:
    """Ratios of the table to prune to: near :data:`PRUNED` of the largest."""
    ratios = list(plans)
    return sorted({min(ratios, key=lambda ratio: abs(ratio - share * ratios[-1])) for share in PRUNED})


def check_apart(targets: dict[float, Plan]) -> None:
    """Refuse sizes of which one removes no more than the one before: nothing could be predicted between them.

    Raises:
        UsageError: there are such; heads and channels come in steps.
    """
    for (ratio, plan), (larger, other) in pairwise(targets.items()):
        if other.achieved <= plan.achieved:
            raise UsageError(
                f"points {ratio:g} and {larger:g} both remove {plan.achieved:.2%}, the nearest that heads and channels "
                "allow; give --points that are further apart, or a smaller --round-to"
            )


def _prune_all(
    model: PreTrainedModel, job: PruneJob, targets: dict[float, Plan], step: OnPhase | None, budget: int | None
) -> tuple[dict[float, PruneReport], dict[float, str]]:
    """Prune to every size, the smallest first; the reports, and the size that ended in no numbers, with the reason.

    Raises:
        NumericalError: one of the first two sizes gives NaN or infinity, so that nothing can be predicted.
    """
    reports: dict[float, PruneReport] = {}
    for ratio, plan in targets.items():
        try:
            reports[ratio] = _prune(model, job, ratio, plan, step, budget)
        except NumericalError as error:
            if len(reports) < 2:
                raise
            return reports, {
                ratio: f"removing {ratio:.0%} ends in no numbers ({error}); larger sizes are not predicted"
            }
    return reports, {}


def _prune(
    model: PreTrainedModel, job: PruneJob, ratio: float, plan: Plan, step: OnPhase | None, budget: int | None
) -> PruneReport:
    """Prune beside the model, and report the steps of the phases with the ratio."""

    def named(phase: str, *values: Any) -> None:
        assert step is not None
        step(f"{100 * ratio:g}%: {phase}", *values)

    config = replace(job.config, ratio=ratio)
    own = replace(job, config=config, plan=plan, distill_tokens=tokens_to_distill(config, plan, job.windows))
    return run_beside(model, own, by_phase(named) if step else Callbacks(), budget)


def _measured(model: PreTrainedModel, ratio: float, size: MeasuredSize, shape: ModelShape) -> ScanPoint:
    return _point(model, ratio, size.plan, shape, size.losses, measured=True)


def _point(
    model: PreTrainedModel, ratio: float, plan: Plan, shape: ModelShape, losses: dict[str, Loss], *, measured: bool
) -> ScanPoint:
    dense = [layer.sizes for layer in shape.layers]
    before = generation_flops(model.config, dense, shape.parameters, PROMPT_TOKENS, NEW_TOKENS)
    after = generation_flops(model.config, plan.layers, plan.parameters, PROMPT_TOKENS, NEW_TOKENS)
    prefill, decode = (old / new for old, new in zip(before, after))
    return ScanPoint(ratio, plan.achieved, plan.parameters, measured, prefill, decode, losses)


def _kept(ratio: float, report: PruneReport) -> dict[str, Any]:
    return {
        "ratio": ratio,
        "divergence": report.divergence,
        "allocation": report.allocation,
        "distillation": report.distillation,
        "seconds": report.seconds,
    }
