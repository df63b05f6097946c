"""What a run says of itself while it goes on: phase, count and time left first; right after a resume too."""

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


def shown(seconds: list[float], terminal: bool, monkeypatch, width: int = 300) -> str:
    """The output once the layers that took these seconds are done."""
    monkeypatch.setattr(console, "out", Console(width=width, force_terminal=terminal, record=True))
    plan = SimpleNamespace(layers=[SIZES] * LAYERS)
    with console.layer_progress(TOKENS, torch.device("cpu")) as callbacks:
        for layer, each in enumerate(seconds):
            callbacks.layer(report(layer, each), plan)
    return console.out.export_text()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_layers_speed_memory_and_time_left(terminal, monkeypatch):
    text = shown([20.0, 40.0], terminal, monkeypatch)
    assert re.search(r"pruning +layer 2/4 +ETA 1:00", text)  # two layers at 30 seconds
    assert "150 tokens/s" in text  # 6000 tokens in the 40 seconds of the last layer
    memory = re.findall(r"([\d.]+) GB in use", text)[-1]
    assert float(memory) == pytest.approx(used_bytes(torch.device("cpu")) / 1e9, abs=0.3)


def test_layers_of_an_earlier_run_count_with_what_they_took_then(monkeypatch):
    """A resumed run passes the journal's reports on within a moment; that moment is not what a layer takes."""
    replayed = [20.0, 20.0]  # as the journal has them, whatever the replay took now
    assert "ETA 0:40" in shown(replayed, False, monkeypatch)
    assert "ETA 0:25" in shown([*replayed, 35.0], False, monkeypatch)


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_is_one_line_of_the_terminal(width, monkeypatch):
    text = shown([20.0, 40.0, 30.0, 30.0], True, monkeypatch, width)
    lines = [line.rstrip() for line in re.split("(?=pruning)|\n", text) if line.strip()]
    assert len(lines) >= 2  # frames: the last one stays
    assert max(map(len, lines)) <= width
    assert "layer 4/4" in lines[-1]
    assert ("channels" in lines[-1]) == (width == 120)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (44.6, "0:45"), (59.7, "1:00"), (3599.9, "1:00:00"), (7265, "2:01:05")]
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text
