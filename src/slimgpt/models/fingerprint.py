"""Digests that tell models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from slimgpt.models import adapters
from slimgpt.models.quantization import MODELOPT_FILE
from slimgpt.models.source import Source, weights_folder
from slimgpt.models.streaming import WeightFiles

SAMPLES, SAMPLE_BYTES = 64, 1 << 14


def source_files(source: Source) -> list[Path]:
    """The files that make a model what it is: its config and weights, and those of an adapter that is merged into it.

    Raises:
        ModelError: the hub cannot be reached, or a file cannot be read.
    """
    folder = weights_folder(source)
    if folder is not None:
        beside = [file for file in [folder / MODELOPT_FILE] if file.is_file()]
        files = [folder / "config.json", *beside, *WeightFiles(folder).files]
    else:
        files = [Path(source.location) / str(source.gguf_file)]
    if source.adapter is not None:
        files += [source.adapter / name for name in (adapters.CONFIG_FILE, adapters.WEIGHTS_FILE)]
    return files


def fingerprint(files: Iterable[Path]) -> str:
    """A digest that tells models apart without reading them whole: sizes, and samples spread over every file."""
    total = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            for sample in range(SAMPLES):
                handle.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                total.update(handle.read(SAMPLE_BYTES))
    return total.hexdigest()


def name_and_files(source: Source) -> dict[str, str]:
    """A model's name and the digest of its files, as a run keeps them that may be resumed.

    Raises:
        ModelError: the hub cannot be reached, or a file cannot be read.
    """
    return {"name": source.name, "files": fingerprint(source_files(source))}
