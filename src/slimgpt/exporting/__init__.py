"""A slim model in the forms that engines read. One file per form, and the table of them."""

from slimgpt.exporting.run import FORMATS, ExportReport, Format, check_format, export
from slimgpt.exporting.verification import Verification, verify

__all__ = ["FORMATS", "ExportReport", "Format", "Verification", "check_format", "export", "verify"]
