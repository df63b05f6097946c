"""Where layers run: device, type, placement of activations, processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimgpt.errors import NumericalError
from slimgpt.models.architecture import Sizes
from slimgpt.models.build import rebuild_layer
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.memory import DEVICE, FILE, HOST, USABLE_FRACTION, Placement, free_bytes, used_bytes


@dataclass(frozen=True)
class ExecutionContext:
    """How and where the loop runs.

    Args:
        device: where layers run and are solved, one at a time.
        placement: where activations are kept.
        dtype: of the forward passes; ``None`` runs the layers as they are stored.
        ranks: the processes that share the windows.
        scratch: a folder for activations that memory has no room for.
    """

    device: torch.device
    placement: Placement
    dtype: torch.dtype | None = None
    ranks: Ranks = field(default_factory=Ranks)
    scratch: Path | None = None

    def single_process(self, dtype: torch.dtype | None) -> ExecutionContext:
        """The same in one process, for work that rank 0 does alone.

        Args:
            dtype: of its forward passes.
        """
        return ExecutionContext(self.device, self.placement, dtype, scratch=self.scratch)


def to_compute(tensor: Tensor, run: ExecutionContext) -> Tensor:
    """A tensor where and as the forward passes need it."""
    return tensor.to(run.device, run.dtype if run.dtype is not None and tensor.is_floating_point() else tensor.dtype)


def running_layer(
    layer: nn.Module, model_config: Any, index: int, run: ExecutionContext, sizes: Sizes | None = None
) -> nn.Module:
    """A layer on the device and in the type of the forward passes.

    Args:
        sizes: its widths; by default what the config says.
    """
    running = {name: to_compute(tensor, run) for name, tensor in layer.state_dict().items()}
    return rebuild_layer(layer, model_config, index, running, sizes).to(run.device)


def check_output(index: int, hidden: Tensor) -> None:
    """Refuse hidden states behind a layer that are not finite.

    Raises:
        NumericalError: they hold NaN or infinity; the layer is named.
    """
    if not bool(torch.isfinite(hidden).all()):
        raise NumericalError(f"layer {index}: its output holds NaN or infinity on the calibration text")


def activation_store_for(run: ExecutionContext, size: int) -> ActivationStore:
    """A shelf for ``size`` bytes: where the stream is, or farther off if they take more than a quarter of the room.

    What grows with the depth of the model is never in the memory of a run from folder to folder on a CPU. Host memory
    has its limits, too: all matrices in fp32, with what Adam remembers of them, are several times the model.
    """
    place, on_cpu = run.placement.stream, run.device.type == "cpu"
    room = run.placement.budget - used_bytes(run.device)
    if place == DEVICE and (size > room // 4 or (on_cpu and run.scratch is not None)):
        place = FILE if on_cpu else HOST
    if place == HOST and size > free_bytes(torch.device("cpu")) * USABLE_FRACTION / 2:
        place = FILE
    return ActivationStore(place, run.device, run.scratch)
