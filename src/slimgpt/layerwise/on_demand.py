"""A model run as a whole though not all of it is on the device: layers come when they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.layerwise.capture import patched_layers
from slimgpt.layerwise.context import ExecutionContext, running_layer
from slimgpt.layerwise.divergence import on_device
from slimgpt.models.build import decoder_layers
from slimgpt.runtime.memory import DEVICE, Placement, memory_limit, used_bytes

RESIDENT_SHARE = 3
"""Layers stay on the device until they take one part in so many of what was free."""


@contextmanager
def layers_on_demand(
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    run: ExecutionContext,
    on_output: Callable[[int, Tensor], None] | None = None,
) -> Iterator[None]:
    """Context manager: the model runs on the device, and every layer is loaded to it when it is called; those that fit
    stay until the end of the block.

    Args:
        model: what is around the layers; it is as it was afterwards.
        load_layer: gives the layer of an index.
        on_output: called with the index of a layer and its output hidden states.
    """
    layers, resident = decoder_layers(model), dict[int, nn.Module]()
    originals = list(layers)
    used = used_bytes(run.device)
    free = max(run.placement.budget - used, 0)

    def run_layer_of(index: int, *args: Any, **kwargs: Any) -> Any:
        layer = resident.get(index)
        if layer is None:
            stand_in, layers[index] = layers[index], originals[index]  # what is taken comes from there, or is made so
            layer = running_layer(load_layer(index), model.config, index, run)
            layers[index] = stand_in
            if used_bytes(run.device) < used + free // RESIDENT_SHARE:
                resident[index] = layer
        returned = layer(*args, **kwargs)
        if on_output is not None:
            on_output(index, returned[0] if isinstance(returned, tuple) else returned)
        return returned

    numbers = {id(layer): index for index, layer in enumerate(originals)}
    with (
        on_device(model, run.device, run.dtype),
        patched_layers(layers, lambda layer: partial(run_layer_of, numbers[id(layer)])),
    ):
        yield


def on_demand(
    load_layer: Callable[[int], nn.Module], budget: int | None
) -> Callable[[PreTrainedModel, torch.device, torch.dtype], AbstractContextManager[None]]:
    """:func:`layers_on_demand` for given layers, with the device and the type to be chosen.

    Args:
        budget: bytes that may be used on the device; ``None``: what is free.
    """

    def placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
        limit = memory_limit(device, budget, used_bytes(device))
        run = ExecutionContext(device, Placement(limit, DEVICE, DEVICE), dtype)
        return layers_on_demand(model, load_layer, run)

    return placed
