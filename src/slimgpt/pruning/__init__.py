"""The only room that changes a model."""

from slimgpt.pruning.report import LayerReport, PruneReport, total_seconds
from slimgpt.pruning.sequential import check_finite, prune_layers

__all__ = ["LayerReport", "PruneReport", "check_finite", "prune_layers", "total_seconds"]
