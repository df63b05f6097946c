"""Steps as CUDA graphs, with a graph that runs the step again on the text where it was captured: CPUs have none."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from slimgpt.distillation import captured_steps
from slimgpt.distillation.captured_steps import EAGER_STEPS, CapturedSteps, StepInputs
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.runtime.memory import Placement

RUN = ExecutionContext(torch.device("cpu"), Placement(10**9, "device", "device"))


def text(value: float, batches: int = 2) -> StepInputs:
    def each(scale):
        return [torch.full((2, 3), scale * (value + number)) for number in range(batches)]

    return StepInputs(each(1.0), each(10.0), each(100.0), [[{}]] * batches)


class Steps:
    """Adds the text up in a tensor of its own, as a training moves its weights."""

    def __init__(self):
        self.weights, self.results = torch.zeros(1), torch.zeros(1)
        self.recording, self.read_at = False, set()

    def __call__(self, inputs, weight):
        if not self.recording:
            self.weights += weight * sum(tensor.sum() for tensor in inputs.tensors)
            self.results.copy_(self.weights)
            self.read_at.add(tuple(tensor.data_ptr() for tensor in inputs.tensors))
        return self.results, []


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins of a GPU's graphs, and all that were made."""
    made = []

    class Graph:
        def __init__(self):
            made.append(self)
            self.replays = 0

        def pool(self):
            return "pool"

        def replay(self):
            self.replays += 1
            self.step(*self.arguments)

    @contextmanager
    def recorded(graph, pool):
        graph.shared = pool
        step = recorded.step
        step.recording = True
        yield
        step.recording = False

    real = CapturedSteps._capture

    def capture(self, inputs, weight):
        recorded.step = self.step
        known = real(self, inputs, weight)
        known.graph.step, known.graph.arguments = self.step, (known.inputs, weight)
        return known

    monkeypatch.setattr(captured_steps, "_stream_kept", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(CapturedSteps, "_capture", capture)
    return made


def many(steps, inputs, count):
    for _ in range(count):
        steps(inputs, 1.0)


def on_gpu(step, why_not=lambda: None):
    return CapturedSteps(replace(RUN, device=SimpleNamespace(type="cuda")), step, why_not)


def test_replayed_steps_end_where_single_ones_do(graphs):
    values = [(float(number), 1.0 if number % 3 else 0.5) for number in range(14)]
    plain, captured = Steps(), Steps()
    one, other = CapturedSteps(RUN, plain), on_gpu(captured)
    for value, weight in values:
        expected, _ = one(text(value), weight)
        replayed, _ = other(text(value), weight)
        assert torch.equal(expected, replayed)
    counts = [sum(weight == each for _, weight in values) for each in (0.5, 1.0)]
    assert sorted(graph.replays for graph in graphs) == sorted(count - EAGER_STEPS for count in counts)
    assert [graph.shared for graph in graphs] == [None, "pool"]
    assert not one.captured


def test_a_shape_of_its_own_has_a_graph_of_its_own_and_no_text_none(graphs):
    steps = on_gpu(Steps())
    for number in range(2 * EAGER_STEPS + 2):
        steps(text(1.0, batches=1 + number % 2), 1.0)
        steps(text(1.0, batches=0), 1.0)
    assert len(graphs) == 2


def test_what_cannot_be_captured_is_said_once_and_run_all_the_same(graphs):
    step = Steps()
    steps = on_gpu(step, lambda: "several processes share it")
    with pytest.warns(UserWarning, match="not captured as CUDA graphs: several") as caught:
        many(steps, text(1.0), EAGER_STEPS + 3)
    assert len(caught) == 1
    assert not graphs
    assert float(step.weights) == pytest.approx((EAGER_STEPS + 3) * float(sum(t.sum() for t in text(1.0).tensors)))


def test_a_capture_that_fails_is_said_and_the_step_is_run(monkeypatch):
    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nlong explanation")

    monkeypatch.setattr(CapturedSteps, "_capture", fails)
    step = Steps()
    steps = on_gpu(step)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing$"):
        many(steps, text(0.0), EAGER_STEPS + 2)
    assert float(step.weights) == pytest.approx((EAGER_STEPS + 2) * float(sum(t.sum() for t in text(0.0).tensors)))
