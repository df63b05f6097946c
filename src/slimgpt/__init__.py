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
    from slimgpt.checkpoint import Inspection, inspect, save
    from slimgpt.comparison import compare
    from slimgpt.comparison.model_result import CompareConfig
    from slimgpt.comparison.result import Comparison
    from slimgpt.comparison.timing import Timings, speed
    from slimgpt.config import PruneConfig
    from slimgpt.errors import SlimGPTError
    from slimgpt.evaluation import evaluate_tasks
    from slimgpt.evaluation.evaluate import evaluate
    from slimgpt.evaluation.perplexity import Perplexity
    from slimgpt.evaluation.tasks import TaskScores
    from slimgpt.exporting import export, verify
    from slimgpt.exporting.engine_verification import EngineVerification, verify_in_engine
    from slimgpt.exporting.run import ExportReport
    from slimgpt.exporting.verification import Verification
    from slimgpt.models import ARCHITECTURES, Architecture, Fused, Structure, load, register
    from slimgpt.pipeline.estimate import Estimate, plan
    from slimgpt.pipeline.in_memory import prune
    from slimgpt.pipeline.to_folder import prune_folder
    from slimgpt.planning import Plan, make_plan
    from slimgpt.pruning import PruneReport
    from slimgpt.recovery import recover
    from slimgpt.recovery.run import Recovery
    from slimgpt.scanning.report import ScanReport
    from slimgpt.scanning.run import scan

__version__ = "0.2.0"

_HOME = {
    "ARCHITECTURES": "models",
    "Architecture": "models",
    "CompareConfig": "comparison.measure",
    "Comparison": "comparison.result",
    "EngineVerification": "exporting.engine_verification",
    "Estimate": "pipeline.estimate",
    "ExportReport": "exporting.run",
    "Fused": "models",
    "Inspection": "checkpoint",
    "Perplexity": "evaluation.perplexity",
    "Plan": "planning",
    "PruneConfig": "config",
    "PruneReport": "pruning",
    "Recovery": "recovery.run",
    "ScanReport": "scanning.report",
    "SlimGPTError": "errors",
    "Structure": "models",
    "TaskScores": "evaluation.tasks",
    "Timings": "comparison.timing",
    "Verification": "exporting.verification",
    "compare": "comparison",
    "evaluate": "evaluation.evaluate",
    "evaluate_tasks": "evaluation",
    "export": "exporting",
    "inspect": "checkpoint",
    "load": "models",
    "make_plan": "planning",
    "plan": "pipeline.estimate",
    "prune": "pipeline.in_memory",
    "prune_folder": "pipeline.to_folder",
    "recover": "recovery",
    "register": "models",
    "save": "checkpoint",
    "scan": "scanning.run",
    "speed": "comparison.timing",
    "verify": "exporting",
    "verify_in_engine": "exporting.engine_verification",
}

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "CompareConfig",
    "Comparison",
    "EngineVerification",
    "Estimate",
    "ExportReport",
    "Fused",
    "Inspection",
    "Perplexity",
    "Plan",
    "PruneConfig",
    "PruneReport",
    "Recovery",
    "ScanReport",
    "SlimGPTError",
    "Structure",
    "TaskScores",
    "Timings",
    "Verification",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "export",
    "inspect",
    "load",
    "make_plan",
    "plan",
    "prune",
    "prune_folder",
    "recover",
    "register",
    "save",
    "scan",
    "speed",
    "verify",
    "verify_in_engine",
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
