"""SlimGPT: make a trained language model smaller.

>>> import slimgpt
>>> model, tokenizer = slimgpt.load("demo")
>>> report = slimgpt.prune(model, tokenizer, ratio=0.2, calibration="demo")
>>> slimgpt.save(model, tokenizer, report, "slim/")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgpt.checkpoint import inspect, save
    from slimgpt.comparison import compare
    from slimgpt.errors import SlimGPTError
    from slimgpt.evaluation import evaluate_tasks
    from slimgpt.evaluation.evaluate import evaluate
    from slimgpt.exporting import export, verify
    from slimgpt.models import ARCHITECTURES, Architecture, Fused, Structure, load, register
    from slimgpt.pipeline.in_memory import prune
    from slimgpt.pipeline.to_folder import prune_folder
    from slimgpt.planning import Plan, make_plan
    from slimgpt.pruning import PruneReport
    from slimgpt.recovery import recover
    from slimgpt.scanning.run import scan

__version__ = "0.1.0"

_HOME = {
    "ARCHITECTURES": "models",
    "Architecture": "models",
    "Fused": "models",
    "Plan": "planning",
    "PruneReport": "pruning",
    "SlimGPTError": "errors",
    "Structure": "models",
    "compare": "comparison",
    "evaluate": "evaluation.evaluate",
    "evaluate_tasks": "evaluation",
    "export": "exporting",
    "inspect": "checkpoint",
    "load": "models",
    "make_plan": "planning",
    "prune": "pipeline.in_memory",
    "prune_folder": "pipeline.to_folder",
    "recover": "recovery",
    "register": "models",
    "save": "checkpoint",
    "scan": "scanning.run",
    "verify": "exporting",
}

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Fused",
    "Plan",
    "PruneReport",
    "SlimGPTError",
    "Structure",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "inspect",
    "load",
    "make_plan",
    "prune",
    "prune_folder",
    "recover",
    "register",
    "save",
    "scan",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: torch and transformers take seconds, and `--help` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module 'slimgpt' has no attribute '{name}'")
    value = getattr(import_module(f"slimgpt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
