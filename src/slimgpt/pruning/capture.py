"""What the decoder layers are called with, and one layer run in parts.

The model runs once with every layer replaced by a stand-in that writes down its keyword arguments and hands the
hidden states on, which costs an embedding. Afterwards each layer is run by itself with its *own* arguments: layer
0's masks and position embeddings are wrong for the others wherever attention windows differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.errors import ModelError
from slimgpt.pruning.memory import Shelf

Arguments = dict[str, Any]


@dataclass
class Stream:
    """The hidden states between two layers, and how to call each layer.

    Args:
        hidden: for every batch the hidden states ``(batch, seq_len, hidden_size)``.
        arguments: for every batch the keyword arguments of every layer; equal tensors are shared.
    """

    hidden: Shelf
    arguments: list[list[Arguments]]

    def __len__(self) -> int:
        return len(self.arguments)


class StandIn(nn.Module):
    """Takes a module's place for a while: calls a function instead, and still shows the module's attributes.

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
def stood_in(layers: nn.ModuleList, function: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Every layer replaced by a :class:`StandIn` for a while; ``function`` gives for each what is called instead."""
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = StandIn(layer, function(layer))
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    windows: Tensor,
    batch_size: int,
    hidden: Shelf,
    dtype: torch.dtype | None = None,
) -> Stream:
    """The inputs of the first layer and every layer's arguments, on the device of ``hidden``.

    Args:
        windows: ``(num_samples, seq_len)`` long token ids.
        batch_size: windows per batch.
        hidden: where the hidden states are to be kept.
        dtype: convert what is floating-point to it; ``None`` leaves it as the model makes it.
    """
    arguments: list[list[Arguments]] = []
    known: dict[int, list[Arguments]] = {}  # windows are unpadded: equal batch sizes give equal arguments
    embedding_device = next(model.get_input_embeddings().parameters()).device
    calls: list[tuple[Tensor, Arguments]] = []

    unpacked = False  # whether the model takes apart what a layer returns

    def record(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Where the model takes the first item of what a layer returns, the next layer is called with a part of the
        # hidden states; only the first layer's are wanted.
        hidden_states, named = _named(layer, args, kwargs)
        calls.append((calls[0][0] if calls else hidden_states, named))
        return (calls[0][0], None) if unpacked else calls[0][0]

    with stood_in(layers, lambda layer: partial(record, layer)):
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
                known[len(batch)] = [move(kwargs) for _, kwargs in calls]
            arguments.append(known[len(batch)])
    return Stream(hidden, arguments)


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


def run_layer(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """The hidden states after a layer."""
    output = layer(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def put_parameter(layer: nn.Module, name: str, parameter: Tensor) -> None:
    """Set a parameter of a layer by its full name."""
    owner, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(owner), leaf, parameter)


class _Stop(Exception):
    """Ends a partial run of a layer; carries what the container would have returned."""

    def __init__(self, result: Any):
        super().__init__("the layer was stopped on purpose")
        self.result = result


@dataclass
class Part:
    """What one batch left at a structure's output matrix.

    Args:
        inputs: ``(batch, seq_len, n)``, the input of the output matrix.
        place: the module that can be stood in for with the matrix's output given: its container, or, where that goes
            on computing with the output, the matrix itself.
        rebuild: turns the matrix's output into what the module at ``place`` returns.
    """

    inputs: Tensor
    place: str
    rebuild: Callable[[Tensor], Any]


def run_to(layer: nn.Module, output: str, hidden: Tensor, arguments: Arguments) -> Part:
    """Run a layer up to the input of its matrix ``output``; nothing behind its container is computed."""
    container_name = output.rpartition(".")[0]
    if not container_name:
        return _run_to_matrix(layer, output, hidden, arguments)
    container = layer.get_submodule(container_name)
    linear = layer.get_submodule(output)
    kept: list[Tensor] = []
    marker: list[Tensor] = []

    def output_stub(inputs: Tensor) -> Tensor:
        kept.append(inputs)
        marker.append(inputs.new_empty(()).expand(*inputs.shape[:-1], _out_features(linear)))
        return marker[-1]

    def container_stub(*args: Any, **kwargs: Any) -> Any:
        raise _Stop(container(*args, **kwargs))

    with _replaced(layer, output, output_stub), _replaced(layer, container_name, container_stub):
        try:
            run_layer(layer, hidden, arguments)
        except _Stop as stop:
            result = stop.result
        else:
            raise ModelError(f"the layer never called its module '{container_name}'")
    if len(kept) != 1:
        raise ModelError(f"module '{output}' was called {len(kept)} times in one pass through the layer")
    if result is marker[0]:
        return Part(kept[0], container_name, lambda tensor: tensor)
    if isinstance(result, tuple) and sum(item is marker[0] for item in result) == 1:
        position = next(i for i, item in enumerate(result) if item is marker[0])
        # Attention weights are not wanted; a parameter, such as a bias to be added behind, is the same for every batch.
        rest = tuple(
            None if isinstance(item, Tensor) and not isinstance(item, nn.Parameter) else item for item in result
        )
        return Part(kept[0], container_name, lambda tensor: (*rest[:position], tensor, *rest[position + 1 :]))
    return Part(kept[0], output, lambda tensor: tensor)


def _run_to_matrix(layer: nn.Module, output: str, hidden: Tensor, arguments: Arguments) -> Part:
    def output_stub(inputs: Tensor) -> Tensor:
        raise _Stop(inputs)

    with _replaced(layer, output, output_stub):
        try:
            run_layer(layer, hidden, arguments)
        except _Stop as stop:
            return Part(stop.result, output, lambda tensor: tensor)
    raise ModelError(f"the layer never called its module '{output}'")


def arguments_of(layer: nn.Module, module: str, go: Callable[[], Any]) -> tuple[Any, ...]:
    """What a module of the layer is called with while ``go`` runs the layer, which stops there."""

    def stub(*args: Any, **kwargs: Any) -> Any:
        raise _Stop((*args, *kwargs.values()))

    with _replaced(layer, module, stub):
        try:
            go()
        except _Stop as stop:
            return stop.result
    raise ModelError(f"the layer never called its module '{module}'")


def run_with(
    layer: nn.Module, results: dict[str, Any], hidden: Tensor, arguments: Arguments, until: str | None = None
) -> Any:
    """Run a layer with the results of some of its containers given.

    Args:
        results: container name to what it returns.
        until: stop at this matrix, as :func:`run_to` does, and return its :class:`Part`; else the hidden states.
    """
    if not results:
        return run_to(layer, until, hidden, arguments) if until else run_layer(layer, hidden, arguments)
    (name, result), *rest = results.items()
    with _replaced(layer, name, lambda *_, **__: result):
        return run_with(layer, dict(rest), hidden, arguments, until)


@contextmanager
def _replaced(layer: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    owner_name, _, leaf = name.rpartition(".")
    owner = layer.get_submodule(owner_name)
    original = getattr(owner, leaf)
    setattr(owner, leaf, StandIn(original, function))
    try:
        yield
    finally:
        setattr(owner, leaf, original)


def _out_features(linear: nn.Module) -> int:
    return linear.nf if hasattr(linear, "nf") else linear.weight.shape[0]  # type: ignore[union-attr,return-value]
