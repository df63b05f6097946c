"""Forward and backward passes over all decoder layers, one layer at a time.

Each layer's inputs are kept in an activation store, so that gradients are computed layer by layer, from the last to
the first, without the whole model in memory. A layer may run with several sets of weights (variants), each on hidden
states of its own (a path).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from slimgpt.layerwise.capture import Arguments, call_layer
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, check_finite_flags
from slimgpt.layerwise.shared_states import shared_in
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import DEVICE, used_bytes


@dataclass
class LayerVariant:
    """A layer on the device with one set of weights.

    Args:
        weights: the parameters of ``layer`` whose gradients are computed.
    """

    layer: nn.Module
    weights: list[Tensor]


Variant = TypeVar("Variant", bound=LayerVariant)


@dataclass
class SavedActivations(Generic[Variant]):
    """One batch that has gone through a layer, with its graph; the hidden states are ``(batch, seq_len,
    hidden_size)``."""

    variant: Variant
    hidden: Tensor
    output: Tensor


class LayerPasses(Generic[Variant]):
    """A forward pass over all layers and, where it is to be differentiated, the backward pass after it.

    Args:
        variants: gives for a layer's index and some paths (ascending) the layer as it runs on each of them; it is
            called again in the backward pass. The next variant may be made of the same module.
        arguments: for every batch of the text the keyword arguments of every layer.
        batches: the numbers of the batches that are run.
        save_graphs: keep the graphs of the forward pass while they take less than half of the free memory budget; such
            layers are not run again in the backward pass.
        num_layers: number of layers, where there may be no batch to tell.
    """

    def __init__(
        self,
        variants: Callable[[int, Sequence[int]], Iterable[Variant]],
        arguments: Sequence[Sequence[Arguments]],
        batches: Sequence[int],
        run: ExecutionContext,
        save_graphs: bool = False,
        *,
        num_layers: int | None = None,
    ):
        self.variants, self.arguments, self.batches, self.run = variants, arguments, batches, run
        self.save_graphs = save_graphs
        self.num_layers = len(arguments[batches[0]]) if num_layers is None else num_layers
        self.graphs: dict[tuple[int, int], list[SavedActivations[Variant]]] = {}  # by layer and path
        self.finite: list[tuple[int, Tensor]] = []  # layers, and whether their outputs are
        self.tuple_length = 0  # of what the first layer returned; 0 where that was the hidden states alone

    def forward(
        self, paths: Sequence[ActivationStore], differentiated: Sequence[int] = (), checked: Sequence[int] = ()
    ) -> Iterator[int]:
        """Replace the inputs of the first layer by the outputs of the last; yields each layer's index once it has run.

        Args:
            paths: for every path the hidden states by number of the batch, ``(batch, seq_len, hidden_size)``.
            differentiated: the numbers of the paths that :meth:`backward` is called for; these are on the device.
            checked: the numbers of the batches whose hidden states :meth:`check_finite` looks at, behind every layer.
        """
        ceiling = 0
        if differentiated:
            size = sum(paths[path].get(number).nbytes for path in differentiated for number in self.batches)
            self.inputs = activation_store_for(self.run, int(self.num_layers * size * self._widening()))
            if self.save_graphs and self.inputs.place == DEVICE:
                used = used_bytes(self.run.device)
                ceiling = used + (self.run.placement.budget - used) // 2
        for index in range(self.num_layers):
            variants = self.variants(index, range(len(paths))) if self.batches else ()
            for path, variant in zip(range(len(paths)), variants):
                save = path in differentiated
                graphs = [] if save and ceiling > 0 and used_bytes(self.run.device) < ceiling else None
                for place, number in enumerate(self.batches):
                    hidden = paths[path].get(number)
                    if graphs is not None:
                        graphs.append(self._run_with_graph(variant, hidden, number, index))
                        output = graphs[-1].output.detach()
                    else:
                        if save:
                            self.inputs.put(self._key(index, path, place), hidden)
                        with torch.no_grad():
                            output = self._run(variant.layer, hidden, number, index)
                    if number in checked:
                        self.finite.append((index, torch.isfinite(output).all()))
                    paths[path].put(number, output)
                if graphs is not None:
                    self.graphs[index, path] = graphs
                del variant  # the layer leaves the device before the next one comes
            yield index

    def check_finite(self) -> None:
        """Wait for the device, and refuse hidden states that were no numbers behind a layer.

        Raises:
            NumericalError: they hold NaN or infinity; the first layer is named.
        """
        layers, finite = [index for index, _ in self.finite], [flag for _, flag in self.finite]
        self.finite = []
        check_finite_flags(layers, finite)

    def backward(
        self, gradients: dict[int, list[Tensor]]
    ) -> Iterator[tuple[int, Iterator[tuple[Variant, list[Tensor]]]]]:
        """Each layer's index, from the last to the first, and the gradients of its weights, batch by batch.

        A layer's gradients are to be read to their end before the next layer's; its weights may be changed then.

        Args:
            gradients: for every differentiated path and batch those with respect to the hidden states behind the last
                layer; they are replaced in place, at the end by those with respect to the inputs of the first.
        """
        for index in reversed(range(self.num_layers)):
            yield index, self._weight_gradients(index, gradients)

    def _weight_gradients(
        self, index: int, gradients: dict[int, list[Tensor]]
    ) -> Iterator[tuple[Variant, list[Tensor]]]:
        for path, place, saved in self._saved(index, list(gradients)):
            inputs = [saved.hidden, *saved.variant.weights]
            hidden_gradient, *weight_gradients = torch.autograd.grad(
                saved.output, inputs, gradients[path][place], materialize_grads=True
            )
            gradients[path][place] = hidden_gradient
            yield saved.variant, weight_gradients

    def _saved(self, index: int, paths: list[int]) -> Iterator[tuple[int, int, SavedActivations[Variant]]]:
        """The graphs of a layer with their path and the place of their batch: saved ones, and those computed again."""
        recomputed = [path for path in paths if (index, path) not in self.graphs and self.batches]
        for path in paths:
            for place, saved in enumerate(self.graphs.pop((index, path), [])):
                yield path, place, saved
        for path, variant in zip(recomputed, self.variants(index, recomputed) if recomputed else ()):
            for place, number in enumerate(self.batches):
                hidden = self.inputs.take(self._key(index, path, place))
                yield path, place, self._run_with_graph(variant, hidden, number, index)

    def _run_with_graph(self, variant: Variant, hidden: Tensor, number: int, index: int) -> SavedActivations[Variant]:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            return SavedActivations(variant, leaf, self._run(variant.layer, leaf, number, index))

    def _run(self, layer: nn.Module, hidden: Tensor, number: int, index: int) -> Tensor:
        output, length = call_layer(layer, hidden, self.arguments[number][index])
        if index == 0:
            self.tuple_length = length
        return output

    def _widening(self) -> float:
        """Largest inputs of a layer relative to the first one's; above 1 where layers leave something for others."""
        shared = shared_in(self.arguments[self.batches[0]][0]) if self.batches else None
        return 1 + shared.widest / shared.hidden_size if shared is not None else 1

    def _key(self, index: int, path: int, place: int) -> int:
        return (path * self.num_layers + index) * len(self.batches) + place
