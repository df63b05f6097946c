"""Names of earlier versions, for scripts that import them from here."""

from slimgpt.config import make_config
from slimgpt.evaluation.evaluate import evaluate
from slimgpt.pipeline.in_memory import prune
from slimgpt.planning.planner import plan_for

__all__ = ["evaluate", "make_config", "plan_for", "prune"]
