"""A target becomes a plan of widths, from the config alone."""

from slimgpt.planning.plan import HEAD_UNITS, TOLERANCE, Plan, head_units, make_plan
from slimgpt.planning.ratios import DEFAULT_RATIO, RATIOS, layer_ratios

__all__ = ["DEFAULT_RATIO", "HEAD_UNITS", "RATIOS", "TOLERANCE", "Plan", "head_units", "layer_ratios", "make_plan"]
