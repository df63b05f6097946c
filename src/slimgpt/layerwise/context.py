"""Execution of layers: device, dtype, placement of activations, processes."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Device, dtype, placement and processes that layers are run with.

    Args:
        device: where layers run and are solved, one at a time.
        placement: placement of activations.
        dtype: of the forward passes; ``None`` runs the layers as they are stored.
        ranks: the processes that share the windows.
        scratch: folder of memory-mapped activations.
    """

    device: torch.device
    placement: Placement
    dtype: torch.dtype | None = None
    ranks: Ranks = field(default_factory=Ranks)
    scratch: Path | None = None


def to_compute(tensor: Tensor, run: ExecutionContext) -> Tensor:
    """A tensor on the device and in the dtype of the forward passes."""
    return tensor.to(run.device, run.dtype if run.dtype is not None and tensor.is_floating_point() else tensor.dtype)


def running_layer(
    layer: nn.Module, model_config: Any, index: int, run: ExecutionContext, sizes: Sizes | None = None
) -> nn.Module:
    """A layer on the device and in the type of the forward passes.

    Args:
        sizes: its widths; by default what the config says.
    """
    state = {name: to_compute(tensor, run) for name, tensor in layer.state_dict().items()}
    return rebuild_layer(layer, model_config, index, state, sizes).to(run.device)


def check_finite_output(index: int, hidden: Tensor) -> None:
    """Refuse non-finite hidden states behind a layer.

    Raises:
        NumericalError: they hold NaN or infinity; the layer is named.
    """
    check_finite_flags([index], [torch.isfinite(hidden).all()])


def check_finite_flags(layers: Sequence[int], finite: Sequence[Tensor]) -> None:
    """Refuse non-finite hidden states behind some layers.

    Args:
        finite: whether each layer's are, ``()`` bool on the device.

    Raises:
        NumericalError: the first layer whose hidden states hold NaN or infinity is named.
    """
    flags = torch.stack(list(finite)).cpu().tolist() if finite else []
    for index, flag in zip(layers, flags, strict=True):
        if not flag:
            raise NumericalError(f"layer {index}: its output holds NaN or infinity on the calibration text")


def activation_store_for(run: ExecutionContext, size: int) -> ActivationStore:
    """An activation store for ``size`` bytes: placed as the hidden states are, or on a slower medium if it takes more
    than a quarter of the free budget.

    On a CPU, a run from folder to folder keeps data that grow with the depth of the model in files. Host memory is
    checked, too: all matrices in fp32 with Adam's moments are several times the model.
    """
    place, on_cpu = run.placement.stream, run.device.type == "cpu"
    free = run.placement.budget - used_bytes(run.device)
    if place == DEVICE and (size > free // 4 or (on_cpu and run.scratch is not None)):
        place = FILE if on_cpu else HOST
    if place == HOST and size > free_bytes(torch.device("cpu")) * USABLE_FRACTION / 2:
        place = FILE
    return ActivationStore(place, run.device, run.scratch)
