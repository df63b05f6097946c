"""The layer-wise problem as pure tensor functions: Gram matrices, selection, repair. Imports torch only."""

from slimgpt.solver.criteria import CRITERIA, Criterion
from slimgpt.solver.hessian import Gram, damp
from slimgpt.solver.obs import group_sizes, select_channels, select_heads
from slimgpt.solver.reconstruction import reconstruct, relative_error

__all__ = [
    "CRITERIA",
    "Criterion",
    "Gram",
    "damp",
    "group_sizes",
    "reconstruct",
    "relative_error",
    "select_channels",
    "select_heads",
]
