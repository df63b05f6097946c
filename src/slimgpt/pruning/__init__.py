"""The only room that changes a model."""

from slimgpt.pruning.distillation import Distillation, OnDistilled
from slimgpt.pruning.journal import Journal
from slimgpt.pruning.lesson import (
    BACK,
    OnRehearsed,
    disk_to_distill,
    passes_to_distill,
    rehearse,
    repaired_on,
    tokens_to_distill,
)
from slimgpt.pruning.memory import Placement, parse_bytes, place
from slimgpt.pruning.report import LayerReport, PruneReport, total_seconds
from slimgpt.pruning.sensitivity import OnMeasured, allocate, divide, looks, measure, to_measure, weighed
from slimgpt.pruning.sequential import Finished, Run, prune_layers
from slimgpt.pruning.whole import memory_need, prune_model

__all__ = [
    "BACK",
    "Distillation",
    "Finished",
    "Journal",
    "LayerReport",
    "OnDistilled",
    "OnMeasured",
    "OnRehearsed",
    "Placement",
    "PruneReport",
    "Run",
    "allocate",
    "disk_to_distill",
    "divide",
    "looks",
    "measure",
    "memory_need",
    "parse_bytes",
    "passes_to_distill",
    "place",
    "prune_layers",
    "prune_model",
    "rehearse",
    "repaired_on",
    "to_measure",
    "tokens_to_distill",
    "total_seconds",
    "weighed",
]
