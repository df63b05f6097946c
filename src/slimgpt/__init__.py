"""SlimGPT: make a trained language model smaller.

>>> import slimgpt
>>> model, tokenizer = slimgpt.load("demo")
>>> report = slimgpt.prune(model, tokenizer, ratio=0.2, calibration="demo")
>>> slimgpt.save(model, tokenizer, report, "slim/")
"""

from slimgpt.api import evaluate, prune
from slimgpt.checkpoint import inspect, save
from slimgpt.errors import SlimGPTError
from slimgpt.exporting import export, verify
from slimgpt.folders import prune_folder
from slimgpt.models import ARCHITECTURES, Architecture, Fused, Structure, load
from slimgpt.planning import Plan, make_plan
from slimgpt.pruning import PruneReport

__version__ = "0.1.0"

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Fused",
    "Plan",
    "PruneReport",
    "SlimGPTError",
    "Structure",
    "__version__",
    "evaluate",
    "export",
    "inspect",
    "load",
    "make_plan",
    "prune",
    "prune_folder",
    "save",
    "verify",
]
