"""Where activations are kept in a budget of memory, amounts of memory, and the limit of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slimgpt.errors import UsageError
from slimgpt.runtime.memory import MemoryRequirement, Placement, choose_placement, limit_gpu_memory
from slimgpt.runtime.units import parse_bytes


def test_places_follow_the_budget(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("slimgpt.runtime.memory.used_bytes", lambda _: 100)
    monkeypatch.setattr("slimgpt.runtime.memory.free_bytes", lambda _: 1000)
    need = MemoryRequirement(layer=100, solver=300, stream=50, kept=400)
    assert choose_placement(need, cpu, 1000) == Placement(1000, "device", "device")
    assert choose_placement(need, cpu, 899) == Placement(899, "device", "recompute")
    assert choose_placement(need, gpu, 899) == Placement(899, "device", "host")
    assert choose_placement(need, cpu, 480) == Placement(480, "file", "recompute")
    assert choose_placement(need, gpu, 480).stream == "host"
    assert choose_placement(need, cpu, 350).gram == "file"
    for device, budget in ((cpu, 290), (gpu, 390)):
        with pytest.raises(UsageError, match="too small"):
            choose_placement(need, device, budget)
    assert choose_placement(need, cpu) == Placement(950, "device", "device")


@pytest.mark.parametrize(("text", "size"), [("8GB", 8e9), ("1.5 GiB", 1.5 * 2**30), ("800mb", 8e8), ("123", 123)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 bananas", "8GB@2"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UsageError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(("name", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_gpu_is_held_to_the_budget_whether_or_not_it_has_a_number(name, index, monkeypatch):
    """torch's own checks run; only what needs a driver is replaced."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: calls.append(given), raising=False)
    for budget in (8 * 10**9, 800 * 10**9):
        limit_gpu_memory(torch.device(name), budget)
    assert calls == [(0.1, index), (1.0, index)]
