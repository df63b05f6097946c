"""Devices and number types by name, and which type multiplies fastest here."""

from __future__ import annotations

import time
from functools import cache

import torch

from slimgpt.errors import UsageError, one_line
from slimgpt.runtime import setting_checks

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in setting_checks.DTYPES}


def as_dtype(name: str) -> torch.dtype | str:
    """A torch dtype from its name, ``auto`` unchanged.

    Raises:
        UsageError: an unknown name.
    """
    setting_checks.check_dtype("dtype", name)
    return DTYPES.get(name, name)


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name of a dtype, without the module that it is in."""
    return str(dtype).removeprefix("torch.")


def as_device(name: str) -> torch.device:
    """A torch device from its name; ``auto`` is CUDA, then MPS, then the CPU.

    Raises:
        UsageError: an unknown name, or a device this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise UsageError(f"device '{name}' cannot be used here; choose auto, cpu, cuda, cuda:1 or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device '{name}' cannot be used here: {one_line(error)}") from error
    return device


def forward_dtype(setting: str, stored: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The type in which layers are run over calibration tokens; ``None`` leaves them as they are stored.

    ``auto`` leaves them too, except for 16-bit weights on a CPU: there a short timing decides between bfloat16 and
    float32, since only some processors multiply 16-bit numbers faster.

    Raises:
        UsageError: an unknown name.
    """
    named = as_dtype(setting)
    if isinstance(named, torch.dtype):
        return None if named == stored else named
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return None
    fastest = min((torch.bfloat16, torch.float32), key=_cpu_seconds)
    return None if fastest == stored else fastest


@cache
def _cpu_seconds(dtype: torch.dtype) -> float:
    return matmul_seconds(512, 1024, torch.device("cpu"), dtype, repeats=4)


def synchronized_time(device: torch.device) -> float:
    """``time.perf_counter`` once a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matmul_seconds(rows: int, size: int, device: torch.device, dtype: torch.dtype, repeats: int = 3) -> float:
    """Seconds of the fastest of a few products ``(rows, size) x (size, size)``."""
    a = torch.ones(rows, size, device=device, dtype=dtype)
    b = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(synchronized_time(device) - start)
    return min(seconds)
