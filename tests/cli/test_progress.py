"""What a run says of itself while it goes on: layers done, speed, memory, time left; right after a resume too."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from slimgpt.cli import progress as console
from slimgpt.pruning.report import LayerReport
from slimgpt.runtime.memory import used_bytes

LAYERS, TOKENS = 4, 6000
SIZES = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40}


def report(layer: int, seconds: float) -> LayerReport:
    parts = {"load": 0.0, "forward": seconds / 2, "hessian": seconds / 4, "solver": seconds / 4}
    return LayerReport(layer, SIZES, {}, {"heads": 0.01, "channels": 0.02}, 10, 8, parts)


def said(seconds: list[float], terminal: bool, monkeypatch) -> str:
    """What is shown once the layers that took these seconds are done."""
    monkeypatch.setattr(console, "out", Console(width=300, force_terminal=terminal, record=True))
    plan = SimpleNamespace(layers=[SIZES] * LAYERS)
    with console.layer_progress(TOKENS, torch.device("cpu")) as callbacks:
        for layer, each in enumerate(seconds):
            callbacks.layer(report(layer, each), plan)
    return console.out.export_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_layers_speed_memory_and_time_left(terminal, monkeypatch):
    text = said([20.0, 40.0], terminal, monkeypatch)
    assert f"2/{LAYERS}" in text
    assert "150 tokens/s" in text  # 6000 tokens in the 40 seconds of the last layer
    memory = re.findall(r"([\d.]+) GB in use", text)[-1]
    assert float(memory) == pytest.approx(used_bytes(torch.device("cpu")) / 1e9, abs=0.3)
    assert "about 0:01:00 left" in text  # two layers at 30 seconds


def test_layers_of_an_earlier_run_count_with_what_they_took_then(monkeypatch):
    """A resumed run passes the journal's reports on within a moment; that moment is not what a layer takes."""
    replayed = [20.0, 20.0]  # as the journal has them, whatever the replay took now
    assert "about 0:00:40 left" in said(replayed, False, monkeypatch)
    assert "about 0:00:25 left" in said([*replayed, 35.0], False, monkeypatch)
