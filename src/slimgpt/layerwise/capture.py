"""Inputs and keyword arguments of all decoder layers.

The model runs once with every layer replaced by a proxy that records its keyword arguments and returns the hidden
states unchanged, which costs an embedding. Afterwards each layer is run by itself with its *own* arguments: layer
0's masks and position embeddings are wrong for the others wherever attention windows differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.errors import ModelError
from slimgpt.layerwise.shared_states import shared_in, shared_states
from slimgpt.models.lookup import lookup
from slimgpt.runtime.activation_store import ActivationStore

Arguments = dict[str, Any]


@dataclass
class LayerInputs:
    """The hidden states between two layers, and how to call each layer.

    Args:
        hidden: for every batch the hidden states ``(batch, seq_len, hidden_size)``.
        arguments: for every batch the keyword arguments of every layer; equal tensors are shared.
    """

    hidden: ActivationStore
    arguments: list[Sequence[Arguments]]

    def __len__(self) -> int:
        return len(self.arguments)


class BatchArguments(Sequence[Arguments]):
    """The keyword arguments of every layer for one batch, some of which come from a store whenever they are asked for.

    Args:
        equal: those that all batches of this size share, by layer.
        names: the others.
        stored: the store of those, for all batches.
        first: the number of the first of this batch; they are numbered layer by layer.
    """

    def __init__(self, equal: Sequence[Arguments], names: Sequence[str], stored: ActivationStore, first: int):
        self.equal, self.names, self.stored, self.first = equal, names, stored, first

    def __len__(self) -> int:
        return len(self.equal)

    def __getitem__(self, index: int) -> Arguments:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.first + index * len(self.names)
        return {**self.equal[index], **{name: self.stored.get(start + i) for i, name in enumerate(self.names)}}


class ModuleProxy(nn.Module):
    """Proxy that temporarily replaces a module: calls ``function``, forwards attribute access to the original.

    Some models read an attribute of a layer before they call it, such as its attention type.
    """

    def __init__(self, original: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.function = function
        self.original = [original]  # in a list, so that it is not registered as a sub-module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@contextmanager
def patched_layers(layers: nn.ModuleList, function: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Context manager: every layer is a :class:`ModuleProxy`; ``function`` gives for each what is called instead."""
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = ModuleProxy(layer, function(layer))
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    windows: Tensor,
    batch_size: int | list[int],
    hidden: ActivationStore,
    dtype: torch.dtype | None = None,
) -> LayerInputs:
    """The inputs of the first layer and every layer's arguments, on the device of ``hidden``.

    Args:
        windows: ``(num_samples, seq_len)`` long token ids.
        batch_size: windows per batch, or those of every batch.
        hidden: store of the hidden states.
        dtype: convert what is floating-point to it; ``None`` leaves it as the model makes it.
    """
    architecture = lookup(model.config)
    by_batch = tuple(architecture.by_batch) if architecture is not None else ()
    stored = hidden.empty_like() if by_batch else hidden
    layouts = shared_states(model.config)
    arguments: list[Sequence[Arguments]] = []
    known: dict[int, list[Arguments]] = {}  # windows are unpadded: equal batch sizes give equal arguments
    embedding_device = next(model.get_input_embeddings().parameters()).device
    calls: list[tuple[Tensor, Arguments]] = []

    unpacked = False  # whether the model unpacks the tuple that a layer returns

    def record(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Where the model takes the first item of what a layer returns, the next layer is called with a part of the
        # hidden states; only the first layer's are wanted.
        hidden_states, named = _named(layer, args, kwargs)
        calls.append((calls[0][0] if calls else hidden_states, named))
        return (calls[0][0], None) if unpacked else calls[0][0]

    with patched_layers(layers, lambda layer: partial(record, layer)):
        for number, batch in enumerate(windows.split(batch_size)):
            inputs = {"input_ids": batch.to(embedding_device), "use_cache": False}
            try:
                calls.clear()
                model.base_model(**inputs)
            except ValueError:  # a tensor of another length than the tuple that the model expects
                if unpacked or len(calls) != 1:
                    raise
                unpacked = True
                calls.clear()
                model.base_model(**inputs)
            if len(calls) != len(layers):
                raise ModelError(f"{len(calls)} of {len(layers)} layers were called in one forward pass")
            move = _Mover(hidden.device, dtype)
            hidden.put(number, move(calls[0][0]))
            if len(batch) not in known:
                equal = [{name: kwargs[name] for name in kwargs if name not in by_batch} for _, kwargs in calls]
                known[len(batch)] = [move(kwargs) for kwargs in equal]
                for own, layout in zip(known[len(batch)], layouts):
                    own[layout.argument] = layout
            if not by_batch:
                arguments.append(known[len(batch)])
                continue
            first = number * len(calls) * len(by_batch)
            for place, tensor in enumerate(kwargs[name] for _, kwargs in calls for name in by_batch):
                stored.put(first + place, move(tensor))
            arguments.append(BatchArguments(known[len(batch)], by_batch, stored, first))
    return LayerInputs(hidden, arguments)


def _named(layer: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> tuple[Tensor, Arguments]:
    """The hidden states of a call, which come first, and its other arguments by name."""
    signature = inspect.signature(layer.forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named.pop(next(iter(signature.parameters))), named


class _Mover:
    """Moves the tensors in nested arguments to a device and a floating-point type; shared ones stay shared."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None):
        self.device, self.dtype = device, dtype
        self.moved: dict[int, Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.moved.setdefault(id(value), self._tensor(value))
        if isinstance(value, (tuple, list)):
            return type(value)(self(item) for item in value)
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        if self.dtype is None or self.dtype == tensor.dtype or not tensor.is_floating_point():
            return tensor.to(self.device)
        tensor, limits = tensor.to(self.device), torch.finfo(self.dtype)
        if torch.finfo(tensor.dtype).max > limits.max:  # a mask's lowest number must not become infinity
            tensor = tensor.clamp(limits.min, limits.max)
        return tensor.to(self.dtype)


def call_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> tuple[Tensor, int]:
    """The hidden states after a layer, and the length of the tuple that it returned them in; 0: by themselves.

    Args:
        hidden: those in front of it; with what earlier layers have left for it, where its family does so (see
            :mod:`slimgpt.layerwise.shared_states`), and so are the ones returned.
    """
    shared = shared_in(arguments)
    if shared is not None:
        hidden, states = shared.unpack(hidden)
        arguments = {**arguments, shared.argument: states}
    output = layer(hidden, **arguments)
    after, length = (output[0], len(output)) if isinstance(output, tuple) else (output, 0)
    return (after if shared is None else shared.pack(after, states)), length


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The hidden states after a layer; see :func:`call_layer`."""
    return call_layer(layer, hidden, arguments)[0]


def put_parameter(layer: nn.Module, name: str, parameter: Tensor) -> None:
    """Set a parameter of a layer by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(owner), leaf, parameter)
