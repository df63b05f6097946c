"""Settings of tiny runs from folder to folder, and what their folders hold."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu", "batch_size": 3}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds seconds."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "slimgpt.json"}


def report_of(folder: Path) -> dict:
    """The report without seconds."""
    report = json.loads((folder / "slimgpt.json").read_text())
    for part in (report, *report["layers"], report["allocation"], report["distillation"], report["divergence"]):
        part.pop("seconds", None)
    for part in (report["execution"], report["allocation"].get("experts", {})):
        part.pop("processor_seconds", None)
    return report
