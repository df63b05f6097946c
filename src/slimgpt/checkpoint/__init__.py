"""Save a slim model as an ordinary Hugging Face folder; look into one."""

from slimgpt.checkpoint.assemble_folder import assemble
from slimgpt.checkpoint.inspecting import Inspection, inspect, read_report
from slimgpt.checkpoint.saving import save

__all__ = [
    "Inspection",
    "assemble",
    "inspect",
    "read_report",
    "save",
]
