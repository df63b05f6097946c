"""Steps of a training as CUDA graphs: a GPU replays what Python would start kernel by kernel.

A step of a small model takes a GPU milliseconds, and Python a tenth of a second to start its thousands of kernels.
A step is captured once for every shape of its text; before each replay its text is copied to where the graph reads it.
What a step changes (weights, moments, the rate) stays where it is, so that a replay goes on from it. Written against
PyTorch's documentation of CUDA graphs, and not yet run on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimgpt.layerwise.capture import Arguments
from slimgpt.layerwise.context import ExecutionContext

EAGER_STEPS = 3
"""Steps of every shape before it is captured, so that libraries have made their workspaces and choices."""


@dataclass(frozen=True)
class StepInputs:
    """The text of a step on the device, by batch.

    Args:
        hidden: the inputs of the first layer, ``(batch, seq_len, hidden_size)``.
        dense: the dense model's hidden states behind the last layer.
        ids: the tokens, ``(batch, seq_len)``.
        arguments: the keyword arguments of every layer.
    """

    hidden: list[Tensor]
    dense: list[Tensor]
    ids: list[Tensor]
    arguments: list[Sequence[Arguments]]

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that differs from step to step."""
        return [*self.hidden, *self.dense, *self.ids]

    def cloned(self) -> StepInputs:
        """The same in memory of its own."""
        hidden, dense, ids = ([tensor.clone() for tensor in part] for part in (self.hidden, self.dense, self.ids))
        return StepInputs(hidden, dense, ids, self.arguments)


StepFunction = Callable[[StepInputs, float], tuple[Tensor, list[Tensor]]]


@dataclass
class _Captured:
    graph: Any
    inputs: StepInputs
    results: tuple[Tensor, list[Tensor]]


class CapturedSteps:
    """Runs steps, and replays them where that can be done.

    Args:
        step: from a step's text and the weight of the cross-entropy to its results; it waits for nothing, and changes
            tensors only in place.
        why_not: tells why steps cannot be captured, once some have been run; ``None`` if they can.
    """

    def __init__(self, run: ExecutionContext, step: StepFunction, why_not: Callable[[], str | None] = lambda: None):
        self.run, self.step, self.why_not = run, step, why_not
        self.done: dict[Any, int] = {}
        self.captured: dict[Any, _Captured] = {}
        self.pool: Any = None
        self.capturing = run.device.type == "cuda"

    def __call__(self, inputs: StepInputs, text: float) -> tuple[Tensor, list[Tensor]]:
        """One step; its results hold until the next one."""
        key = (tuple(tensor.shape for tensor in inputs.tensors), text)
        count = self.done[key] = self.done.get(key, 0) + 1
        if not self.capturing or not inputs.ids or (key not in self.captured and count <= EAGER_STEPS):
            return self.step(inputs, text)
        if key not in self.captured and not self._try_to_capture(key, inputs, text):
            return self.step(inputs, text)
        known = self.captured[key]
        for target, tensor in zip(known.inputs.tensors, inputs.tensors, strict=True):
            target.copy_(tensor)
        known.graph.replay()
        return known.results

    def _try_to_capture(self, key: Any, inputs: StepInputs, text: float) -> bool:
        """Whether the steps like this one can be replayed from now on; if not, it is said why."""
        reason = self.why_not()
        if reason is None:
            try:
                self.captured[key] = self._capture(inputs, text)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
        self.capturing = reason is None
        if reason is not None and self.run.ranks.main:
            warnings.warn(f"the training's steps are not captured as CUDA graphs: {reason}", stacklevel=2)
        return self.capturing

    def _capture(self, inputs: StepInputs, text: float) -> _Captured:
        """Record a step without running it."""
        own, graph = inputs.cloned(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.run.device)
        with torch.cuda.graph(graph, pool=self.pool):
            results = self.step(own, text)
        self.pool = self.pool or graph.pool()
        return _Captured(graph, own, results)
