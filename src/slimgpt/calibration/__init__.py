"""Text to token ids ``(num_samples, seq_len)``."""

from slimgpt.calibration.corpus import Document, read_documents, shuffled
from slimgpt.calibration.sampling import cut_windows, digest, leading_ids, sample_windows

__all__ = ["Document", "cut_windows", "digest", "leading_ids", "read_documents", "sample_windows", "shuffled"]
