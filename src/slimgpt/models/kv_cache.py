"""Preallocated key-value caches: a growing cache is copied for every token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer


class PreallocatedCacheLayer(DynamicLayer):
    """Preallocated key-value cache of a layer: a growing cache is copied for every token.

    Args:
        states: keys and values of the prompt, ``(sequences, heads, tokens, head_dim)`` each.
        length: capacity in tokens.
    """

    def __init__(self, states: tuple[Tensor, Tensor], length: int):
        super().__init__()
        self.lazy_initialization(*states)
        self.buffers = [state.new_empty((*state.shape[:2], length, state.shape[3])) for state in states]
        self.keys, self.values = (buffer[:, :, :0] for buffer in self.buffers)
        self.update(*states)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        for buffer, fresh in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, before:after] = fresh
        self.keys, self.values = (buffer[:, :, :after] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these indices, in their order."""
        tokens = self.get_seq_length()
        kept = []
        for buffer in self.buffers:
            smaller = buffer.new_empty((len(indices), *buffer.shape[1:]))
            smaller[:, :, :tokens] = buffer[indices, :, :tokens]
            kept.append(smaller)
        self.buffers = kept
        self.keys, self.values = (buffer[:, :, :tokens] for buffer in self.buffers)


def preallocated(cache: Any, length: int) -> Any:
    """A cache with its growing layers replaced by preallocated ones; other layers are unchanged."""
    for index, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = PreallocatedCacheLayer((layer.keys, layer.values), length)
    return cache
