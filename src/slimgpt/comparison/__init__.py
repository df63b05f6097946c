"""Models side by side: quality, size and speed in one table, one picture and one page."""

from slimgpt.comparison.compare import compare
from slimgpt.comparison.measure import CompareConfig, Side
from slimgpt.comparison.result import Comparison
from slimgpt.comparison.timing import Timing, Timings, time_models

__all__ = ["CompareConfig", "Comparison", "Side", "Timing", "Timings", "compare", "time_models"]
