"""The only room that changes a model."""

from slimgpt.pruning.journal import Journal
from slimgpt.pruning.memory import Placement, parse_bytes, place
from slimgpt.pruning.report import LayerReport, PruneReport, total_seconds
from slimgpt.pruning.sensitivity import OnMeasured, allocate, measure, to_measure
from slimgpt.pruning.sequential import Finished, Run, prune_layers
from slimgpt.pruning.whole import memory_need, prune_model

__all__ = [
    "Finished",
    "Journal",
    "LayerReport",
    "OnMeasured",
    "Placement",
    "PruneReport",
    "Run",
    "allocate",
    "measure",
    "memory_need",
    "parse_bytes",
    "place",
    "prune_layers",
    "prune_model",
    "to_measure",
    "total_seconds",
]
