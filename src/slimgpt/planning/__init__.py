"""A target becomes a plan of widths, from the config alone."""

from slimgpt.planning.allocation import Sensitivity, StructureCost, allocate_budget, interpolate, trial_plan
from slimgpt.planning.engines import ENGINES, EngineSupport, constraints_for, engine_support
from slimgpt.planning.plan import HEAD_UNITS, TOLERANCE, Plan, head_units
from slimgpt.planning.plan_file import read_plan, to_toml
from slimgpt.planning.planner import make_plan
from slimgpt.planning.schedules import DEFAULT_RATIO, RATIOS, layer_ratios
from slimgpt.planning.targets import CacheTarget, parse_cache
from slimgpt.runtime.units import parse_count, parse_size

__all__ = [
    "DEFAULT_RATIO",
    "ENGINES",
    "HEAD_UNITS",
    "RATIOS",
    "TOLERANCE",
    "CacheTarget",
    "EngineSupport",
    "Plan",
    "Sensitivity",
    "StructureCost",
    "allocate_budget",
    "constraints_for",
    "engine_support",
    "head_units",
    "interpolate",
    "layer_ratios",
    "make_plan",
    "parse_cache",
    "parse_count",
    "parse_size",
    "read_plan",
    "to_toml",
    "trial_plan",
]
