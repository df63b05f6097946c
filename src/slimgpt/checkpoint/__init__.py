"""Save a slim model as an ordinary Hugging Face folder; look into one."""

from slimgpt.checkpoint.assembly import assemble
from slimgpt.checkpoint.folder import check_output, new_folder
from slimgpt.checkpoint.inspecting import Inspection, inspect, read_report
from slimgpt.checkpoint.plot import plot_widths
from slimgpt.checkpoint.saving import save
from slimgpt.models.weight_files import weight_bytes

__all__ = [
    "Inspection",
    "assemble",
    "check_output",
    "inspect",
    "new_folder",
    "plot_widths",
    "read_report",
    "save",
    "weight_bytes",
]
