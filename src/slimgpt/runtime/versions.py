"""Versions of what decides the numbers."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("slimgpt", "torch", "transformers", "safetensors")}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found
