"""Where a run keeps activations of a size."""

from __future__ import annotations

import pytest
import torch

from slimgpt.layerwise.context import ExecutionContext, activation_store_for
from slimgpt.runtime.memory import Placement


@pytest.mark.parametrize(
    ("device", "scratch", "size", "place"),
    [
        ("cuda", True, 2, "device"),  # a quarter of the room there
        ("cuda", True, 4, "host"),
        ("cuda", True, 50, "file"),  # more than half of the host's memory
        ("cuda", False, 50, "file"),
        ("cpu", False, 2, "device"),
        ("cpu", False, 4, "file"),
        ("cpu", True, 2, "file"),
    ],
)
def test_what_is_large_is_kept_farther_off(device, scratch, size, place, tmp_path, monkeypatch):
    for name, size_of in (("used_bytes", 0), ("free_bytes", 100 * 10**9)):
        monkeypatch.setattr(f"slimgpt.layerwise.context.{name}", lambda _, size_of=size_of: size_of)
    placement = Placement(10 * 10**9, "device", "device")
    run = ExecutionContext(torch.device(device), placement, scratch=tmp_path if scratch else None)
    assert activation_store_for(run, size * 10**9).place == place
