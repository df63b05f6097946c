"""Forward passes of a layer stopped at a module, and continued from its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from slimgpt.errors import ModelError
from slimgpt.layerwise.capture import Arguments, ModuleProxy, run_layer


class StopForward(Exception):
    """Ends a partial run of a layer; carries what the container would have returned."""

    def __init__(self, result: Any):
        super().__init__("the layer was stopped on purpose")
        self.result = result


@dataclass
class PartialForward:
    """A forward pass stopped at the input of a structure's output matrix.

    Args:
        inputs: ``(batch, seq_len, n)``, the input of the output matrix.
        module: the name of the module to replace given the matrix's output: its container, or, where that computes
            further with the output, the matrix itself.
        wrap_output: turns the matrix's output into the return value of ``module``.
    """

    inputs: Tensor
    module: str
    wrap_output: Callable[[Tensor], Any]


def run_to(layer: nn.Module, output: str, hidden: Tensor, arguments: Arguments) -> PartialForward:
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
        raise StopForward(container(*args, **kwargs))

    with _replaced(layer, output, output_stub), _replaced(layer, container_name, container_stub):
        try:
            run_layer(layer, hidden, arguments)
        except StopForward as stop:
            result = stop.result
        else:
            raise ModelError(f"the layer never called its module '{container_name}'")
    if len(kept) != 1:
        raise ModelError(f"module '{output}' was called {len(kept)} times in one pass through the layer")
    if result is marker[0]:
        return PartialForward(kept[0], container_name, lambda tensor: tensor)
    if isinstance(result, tuple) and sum(item is marker[0] for item in result) == 1:
        position = next(i for i, item in enumerate(result) if item is marker[0])
        # Attention weights are not wanted; a parameter, such as a bias to be added behind, is the same for every batch.
        rest = tuple(
            None if isinstance(item, Tensor) and not isinstance(item, nn.Parameter) else item for item in result
        )
        return PartialForward(kept[0], container_name, lambda tensor: (*rest[:position], tensor, *rest[position + 1 :]))
    return PartialForward(kept[0], output, lambda tensor: tensor)


def _run_to_matrix(layer: nn.Module, output: str, hidden: Tensor, arguments: Arguments) -> PartialForward:
    def output_stub(inputs: Tensor) -> Tensor:
        raise StopForward(inputs)

    with _replaced(layer, output, output_stub):
        try:
            run_layer(layer, hidden, arguments)
        except StopForward as stop:
            return PartialForward(stop.result, output, lambda tensor: tensor)
    raise ModelError(f"the layer never called its module '{output}'")


def arguments_of(layer: nn.Module, module: str, run: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments of a module's call while ``run`` runs the layer, which stops there."""

    def stub(*args: Any, **kwargs: Any) -> Any:
        raise StopForward((*args, *kwargs.values()))

    with _replaced(layer, module, stub):
        try:
            run()
        except StopForward as stop:
            return stop.result
    raise ModelError(f"the layer never called its module '{module}'")


def run_with(
    layer: nn.Module, results: dict[str, Any], hidden: Tensor, arguments: Arguments, until: str | None = None
) -> Any:
    """Run a layer with some of its modules replaced by their results.

    Args:
        results: module name to its return value.
        until: stop at this matrix, as :func:`run_to` does, and return its result; else the hidden states.
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
    setattr(owner, leaf, ModuleProxy(original, function))
    try:
        yield
    finally:
        setattr(owner, leaf, original)


def _out_features(linear: nn.Module) -> int:
    return linear.nf if hasattr(linear, "nf") else linear.weight.shape[0]  # type: ignore[union-attr,return-value]
