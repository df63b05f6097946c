"""Text to token ids ``(num_samples, seq_len)``."""

from slimgpt.calibration.documents import Document, Instruction, local_files, read_documents, shuffled
from slimgpt.calibration.windows import cut_windows, digest, prefix_ids, render, sample_windows

__all__ = [
    "Document",
    "Instruction",
    "cut_windows",
    "digest",
    "local_files",
    "prefix_ids",
    "read_documents",
    "render",
    "sample_windows",
    "shuffled",
]
