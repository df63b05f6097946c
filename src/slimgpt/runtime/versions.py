"""Versions of Python, the libraries and the device."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

RESUME_VERSIONS = ("slimgpt", "torch", "transformers", "device")


def versions(device: torch.device) -> dict[str, str]:
    """Versions by name: Python, our package and the libraries, and the name of the device."""
    installed = {"python": platform.python_version()}
    installed |= {name: version(name) for name in ("slimgpt", "torch", "transformers", "safetensors")}
    installed["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return installed


def resume_versions(device: torch.device) -> dict[str, str]:
    """The versions that a resumed run must share with the one it resumes, as they may change its numbers."""
    installed = versions(device)
    return {name: installed[name] for name in RESUME_VERSIONS}
