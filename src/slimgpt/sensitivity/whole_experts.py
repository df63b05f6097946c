"""Whether a mixture loses whole experts, channels of them, or both: by trials of plans of equal size."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.families.moe import EXPERTS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.expert_plans import with_whole_experts
from slimgpt.planning.plan import Plan
from slimgpt.runtime.setting_checks import AUTO
from slimgpt.sensitivity.allocate import allocate, enough_text, uses_sensitivity
from slimgpt.sensitivity.measure import OnMeasured
from slimgpt.sensitivity.trial_pruning import TrialLoss, TrialPruning
from slimgpt.sensitivity.windows import most_ranks

MOST_TRIALS = 4
"""Channels, whole experts with and without what else is removed, and half of the better one's."""


@dataclass(frozen=True)
class ExpertsCandidate:
    """A plan that is tried.

    Args:
        share: of what the routed experts lose, taken as whole experts.
        routed_only: whether heads, shared experts and dense layers stay as they are.
    """

    share: float
    routed_only: bool
    plan: Plan


def measures_experts(config: PruneConfig, shape: ModelShape, windows: Tensor) -> bool:
    """Whether it is measured how much experts lose as whole ones: where widths are measured, and of equal layers."""
    chosen = config.whole_experts == AUTO and config.allocation != "schedule"
    sparse = [layer for layer in shape.layers if layer.experts is not None and layer.has_ffn]
    fewer = any(layer.experts is not None and layer.experts.least < layer.sizes[EXPERTS] for layer in sparse)
    return chosen and fewer and enough_text(config, shape, windows)


def choose_widths(
    plan: Plan,
    shape: ModelShape,
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    config: PruneConfig,
    run: ExecutionContext,
    *,
    on_measured: OnMeasured | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """The plan by measured costs (:func:`~slimgpt.sensitivity.allocate.allocate`) and, in a mixture, by trials of whole
    experts; with its entry in the report.

    Raises:
        NumericalError: NaN or infinity on the way, or a Hessian that is not positive definite.
    """
    experts = measures_experts(config, shape, windows)
    later = MOST_TRIALS * len(plan.layers) if experts else 0
    before = 0  # steps of the allocation

    def on_step(number: int, steps: int, seconds: float) -> None:
        nonlocal before
        before = number + 1
        if on_measured:
            on_measured(number, steps + later, seconds)

    info: dict[str, Any] = {"by": "schedule"}
    start = time.perf_counter()
    if uses_sensitivity(config, shape, windows):
        plan, info = allocate(plan, shape, model, load_layer, windows, config, run, on_measured=on_step)
    run = replace(run, ranks=run.ranks.first(most_ranks(windows, shape.widest)))
    if not experts or not run.ranks.member:
        return plan, info
    count, last = before, time.perf_counter()

    def on_layer() -> None:
        nonlocal count, last
        now = time.perf_counter()
        if on_measured and run.ranks.main:
            on_measured(count, before + later, now - last)
        count, last = count + 1, now

    trials = TrialPruning(model, load_layer, windows, config, run, on_layer)
    chosen, entry = choose_experts(plan, shape, config, model.config, trials)
    return chosen, {**info, "experts": entry, "seconds": time.perf_counter() - start}


def choose_experts(
    plan: Plan,
    shape: ModelShape,
    config: PruneConfig,
    model_config: PreTrainedConfig,
    trial: Callable[[Plan], TrialLoss],
) -> tuple[Plan, dict[str, Any]]:
    """The plan of lowest cross-entropy with the text among the given one and those with whole experts of equal size.

    All that routed experts lose is tried as whole experts, beside what heads and shared experts lose in the given plan
    and without that; then half of it, the way that was better. Judged by the text and not by the divergence from the
    dense model: where the two differ, the training that follows goes on where the text says so (docs/lab-notes.md).

    Args:
        plan: what is removed, as channels.
        model_config: of the dense model.
        trial: prunes to a plan and gives what it lost.

    Returns:
        It, and what a report says: the trials, the number of the one chosen, and the processor seconds of all.
    """
    start = time.process_time()
    tried: list[tuple[ExpertsCandidate, TrialLoss]] = []

    def candidate(share: float, routed_only: bool) -> float:
        """The cross-entropy of a candidate; infinity where there is none, or none but one that was tried already."""
        made = with_whole_experts(plan, shape, config, model_config, share, routed_only=routed_only) if share else plan
        if made is None or any(made.layers == other.plan.layers for other, _ in tried):
            return math.inf
        tried.append((ExpertsCandidate(share, routed_only, made), trial(made)))
        return tried[-1][1].cross_entropy

    candidate(0.0, False)
    whole, alone = candidate(1.0, False), candidate(1.0, True)
    if math.isinf(candidate(0.5, alone < whole)):
        candidate(0.5, alone >= whole)
    best = min(range(len(tried)), key=lambda number: tried[number][1].cross_entropy)
    entry = {
        "tried": [
            {
                "share": each.share,
                "routed_only": each.routed_only,
                "experts": sorted({sizes[EXPERTS] for sizes in each.plan.layers if EXPERTS in sizes}),
                "parameters": each.plan.parameters,
                **loss._asdict(),
            }
            for each, loss in tried
        ],
        "chosen": best,
        "processor_seconds": time.process_time() - start,
    }
    return tried[best][0].plan, entry
