"""Versions of Python, the libraries and the device; the machine that times are measured on."""

from __future__ import annotations

import platform
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def timed_machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The settings and the machine that times depend on: device, name of its processor, dtype and threads."""
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """The name of the CPU, or of its architecture where the system does not tell."""
    with suppress(OSError):
        cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if (name := re.search(r"^model name\s*:\s*(.+)$", cpus, re.MULTILINE)) is not None:
            return name[1].strip()
    return platform.processor() or platform.machine()
