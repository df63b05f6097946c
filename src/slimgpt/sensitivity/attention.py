"""Costs of whole attentions: each is taken out of the narrowed model in turn, and the predictions are compared.

The cost of all heads of a layer is no continuation of the cost of some: the heads that stay take over the others' work
as long as there are any. So it is measured, on the trial plan, whose loss the other costs are parts of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.layerwise.capture import Arguments, run_layer
from slimgpt.layerwise.context import ExecutionContext, activation_store_for
from slimgpt.layerwise.divergence import kl_and_cross_entropy, on_device
from slimgpt.models.modeling_slim import skip_attention
from slimgpt.runtime.activation_store import ActivationStore


class AttentionRemoval:
    """Forward passes of a narrowed model without the attention of one layer, for several layers.

    Args:
        narrow_layer: gives the narrow layer of an index, which may be changed.
        attention: what goes with a whole attention; see :class:`slimgpt.models.architecture.Architecture`.
        layers: those whose attention is taken out in turn.
        arguments: for every batch the keyword arguments of every layer.
        batches: the numbers of the batches that are run.
    """

    def __init__(
        self,
        narrow_layer: Callable[[int], nn.Module],
        attention: Sequence[str],
        layers: Collection[int],
        arguments: Sequence[Sequence[Arguments]],
        batches: Sequence[int],
        run: ExecutionContext,
    ):
        self.narrow_layer, self.attention, self.layers = narrow_layer, attention, sorted(layers)
        self.arguments, self.batches, self.run = arguments, batches, run

    def forward(self, inputs: Mapping[int, Tensor]) -> Iterator[int]:
        """Run all layers; yields each one's index once it has run.

        Args:
            inputs: the hidden states in front of the first layer by batch, ``(batch, seq_len, hidden_size)``.
        """
        size = sum(inputs[number].nbytes for number in self.batches)
        self.hidden = activation_store_for(self.run, (len(self.layers) + 1) * size)
        for number in self.batches:
            self.hidden.put(self._key(0, number), inputs[number])
        begun = 0  # paths that have left the narrowed model's, which is path 0
        for index in range(len(self.arguments[0])):
            layer = self.narrow_layer(index)
            leaves = index in self.layers
            for number in self.batches if leaves else ():
                self.hidden.put(self._key(begun + 1, number), self.hidden.get(self._key(0, number)))
            for path in range(begun + 1):
                self._run(layer, index, path)
            if leaves:
                begun += 1
                skip_attention(layer, self.attention)
                self._run(layer, index, begun)
            del layer
            yield index

    def costs(
        self, model: PreTrainedModel, dense: ActivationStore, probe: Sequence[Tensor], tuple_length: int
    ) -> dict[int, float]:
        """By how much the divergence from the dense model grows without each attention, in nats per token; on the
        batches of all processes.

        Args:
            dense: the dense model's hidden states behind the last layer.
            probe: the token ids of every batch, ``(batch, seq_len)``, or of its first windows alone.
            tuple_length: see :func:`slimgpt.layerwise.divergence.kl_and_cross_entropy`.
        """
        paths = range(len(self.layers) + 1)
        totals, tokens = [0.0 for _ in paths], 0
        with on_device(model, self.run.device):
            for number in self.batches:
                ids, with_gradient = probe[number], [False for _ in paths]
                narrowed = [self.hidden.take(self._key(path, number))[: len(ids)] for path in paths]
                teacher = dense.get(number)[: len(ids)]
                kls, _, _ = kl_and_cross_entropy(model, teacher, narrowed, ids, tuple_length, with_gradient)
                totals = [total + kl for total, kl in zip(totals, kls.tolist())]
                tokens += max(len(ids) * (ids.shape[1] - 1), 1)
        *totals, tokens = self.run.ranks.sums([*totals, tokens])
        return {layer: (total - totals[0]) / tokens for layer, total in zip(self.layers, totals[1:])}

    @torch.no_grad()
    def _run(self, layer: nn.Module, index: int, path: int) -> None:
        for number in self.batches:
            hidden = self.hidden.get(self._key(path, number))
            self.hidden.put(self._key(path, number), run_layer(layer, hidden, self.arguments[number][index]))

    def _key(self, path: int, number: int) -> int:
        return path * len(self.arguments) + number
