"""The losses of sizes that were not pruned to, from measured contributions and a few sizes that were."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedConfig

from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.allocation import Sensitivity, StructureCost, predicted_cost
from slimgpt.planning.plan import Plan
from slimgpt.pruning.report import PruneReport
from slimgpt.scanning.interpolation import MonotoneCurve, expit, logit
from slimgpt.scanning.points import Loss
from slimgpt.sensitivity.allocate import allocated

SMALLEST_KL = 1e-9
"""Nats per token below which a divergence counts as this: it has a logarithm."""

SMALLEST_SHARE = 1e-6
"""The same of the share that is removed."""


@dataclass(frozen=True)
class MeasuredSize:
    """A size that the model was pruned to.

    Args:
        plan: the widths that it got.
        costs: the contributions that were measured for it; ``None`` where widths go by a schedule.
        losses: by text.
    """

    plan: Plan
    costs: Sensitivity | None
    losses: dict[str, Loss]


def measured_size(report: PruneReport, texts: Sequence[str]) -> MeasuredSize:
    """What a pruning report says of a size.

    Raises:
        NumericalError: the pruned model predicts NaN or infinity.
    """
    losses = {}
    for text in texts:
        values = report.divergence[text]
        if "kl" not in values:
            raise NumericalError(
                f"with {report.plan.achieved:.1%} removed the model predicts NaN or infinity; try --forward-dtype "
                "float32, or smaller --points"
            )
        losses[text] = Loss(values["kl"]["mean"], values["bits_per_byte"], values["same_top"])
    costs = None
    tried = report.allocation.get("experts", {"chosen": 0})
    if (contributions := report.allocation.get("contributions")) and not tried["chosen"]:  # of channels
        each = [one if isinstance(one, Mapping) else vars(one) for one in contributions]
        costs = Sensitivity(report.allocation["divergence"], tuple(StructureCost(**one) for one in each))
    return MeasuredSize(report.plan, costs, losses)


class LossPredictor:
    """Losses of any size, from sizes that the model was pruned to.

    The cost of a size is the sum of its structures' extrapolated contributions
    (:func:`slimgpt.planning.allocation.predicted_cost`), by those measured at the next smaller and the next larger
    size, the logarithms of both weighed by how near they are; where none were measured it is the share that is removed.
    Where the costs of the measured sizes do not ascend with what they remove (noise can do that), it is the share
    that is removed, too.
    The logarithm of the KL divergence is interpolated monotonically in the logarithm of the cost, and so is the logit
    of the share of equal most likely tokens. At a size that was pruned to the result is what was measured.

    Args:
        sizes: by what they remove, ascending; of those that remove the same the first counts.
        model_config: of the dense model.
    """

    def __init__(
        self, sizes: Sequence[MeasuredSize], shape: ModelShape, config: PruneConfig, model_config: PreTrainedConfig
    ):
        self.shape, self.config, self.model_config = shape, config, model_config
        self.sizes = [size for i, size in enumerate(sizes) if all(_more(size, other) for other in sizes[:i])]
        self.by_share = any(size.costs is None for size in sizes)
        x = self._places()
        if any(right <= left for left, right in pairwise(x)):
            self.by_share = True
            x = self._places()
        self.curves = {}
        for text in sizes[0].losses:
            losses = [size.losses[text] for size in self.sizes]
            self.curves[text] = (
                MonotoneCurve(x, tuple(math.log(max(loss.kl, SMALLEST_KL)) for loss in losses)),
                MonotoneCurve(x, tuple(logit(loss.same_top) for loss in losses)),
                losses[-1].bits_per_byte / max(losses[-1].kl, SMALLEST_KL),
            )

    def plan(self, plan: Plan) -> Plan:
        """The widths that a size is expected to get, by the contributions measured nearest to it.

        Args:
            plan: the one without measuring.
        """
        nearest = min(self.sizes, key=lambda size: abs(size.plan.achieved - plan.achieved))
        if nearest.costs is None:
            return plan
        return allocated(plan, self.shape, nearest.costs, self.config, self.model_config)[0]

    def losses(self, plan: Plan) -> dict[str, Loss]:
        """The predicted losses of widths by text."""
        x, losses = self.log_cost(plan), {}
        for text, (kl, same_top, bits) in self.curves.items():
            predicted = math.exp(kl(x))
            losses[text] = Loss(predicted, bits * predicted, expit(same_top(x)))
        return losses

    def log_cost(self, plan: Plan) -> float:
        """The logarithm of what widths cost by the measured contributions."""
        below = [size for size in self.sizes if size.plan.achieved <= plan.achieved] or [self.sizes[0]]
        above = [size for size in self.sizes if size.plan.achieved > plan.achieved] or [self.sizes[-1]]
        left, right = below[-1], above[0]
        span = right.plan.achieved - left.plan.achieved
        share = (plan.achieved - left.plan.achieved) / span if span else 0.0
        return (1 - share) * self._log_cost(plan, left) + share * self._log_cost(plan, right)

    def _log_cost(self, plan: Plan, size: MeasuredSize) -> float:
        if size.costs is None or self.by_share:
            return math.log(max(plan.achieved, SMALLEST_SHARE))
        return math.log(predicted_cost(plan, self.shape, size.costs))

    def _places(self) -> tuple[float, ...]:
        return tuple(self.log_cost(size.plan) for size in self.sizes)


def _more(size: MeasuredSize, other: MeasuredSize) -> bool:
    return size.plan.achieved > other.plan.achieved
