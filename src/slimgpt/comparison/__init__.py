"""Comparison of models: quality, size and speed as a table, a plot and an HTML report."""

from slimgpt.comparison.compare import compare
from slimgpt.comparison.model_result import CompareConfig, ModelResult
from slimgpt.comparison.result import Comparison
from slimgpt.comparison.timing import Timing, Timings, time_models

__all__ = ["CompareConfig", "Comparison", "ModelResult", "Timing", "Timings", "compare", "time_models"]
