"""A slim model in the forms that engines read. One file per form, and the table of them."""

from slimgpt.exporting.engine_verification import EngineVerification, PromptComparison, verify_in_engine
from slimgpt.exporting.run import FORMATS, ExportReport, Format, check_format, export
from slimgpt.exporting.verification import Verification, verify

__all__ = [
    "FORMATS",
    "EngineVerification",
    "ExportReport",
    "Format",
    "PromptComparison",
    "Verification",
    "check_format",
    "export",
    "verify",
    "verify_in_engine",
]
