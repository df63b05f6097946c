"""Keys and values that a layer leaves for later ones, carried along with the hidden states they were computed from.

They belong to a path and a batch, as hidden states do. So between two layers they follow the hidden states in the last
axis of one tensor, and wherever hidden states are kept, copied or differentiated, they are too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimgpt.models.lookup import lookup, text_config

States = dict[str, tuple[Tensor, Tensor]]
"""Keys and values by the kind of attention, ``(batch, kv_heads, seq_len, head_dim)`` each."""


@dataclass(frozen=True)
class StatesShape:
    """The size of the keys and values that a layer leaves.

    Args:
        key: under which they are left, such as the kind of attention.
    """

    key: str
    kv_heads: int
    head_dim: int

    @property
    def numbers(self) -> int:
        """Numbers per token of keys and values together."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class SharedStates:
    """Layout of the keys and values that follow the hidden states in front of a layer, and behind it.

    Args:
        argument: the layer's argument that takes the states.
        hidden_size: of the hidden states alone.
        before: what the layer gets.
        after: what it hands on: nothing behind the last layer.
        widest: the most numbers per token that follow the hidden states anywhere in the model.
    """

    argument: str
    hidden_size: int
    before: tuple[StatesShape, ...]
    after: tuple[StatesShape, ...]
    widest: int

    def unpack(self, packed: Tensor) -> tuple[Tensor, States]:
        """The hidden states and the keys and values behind them.

        Args:
            packed: ``(batch, seq_len, hidden_size + numbers)``.
        """
        widths = [size for each in self.before for size in (each.numbers // 2,) * 2]
        hidden, *parts = packed.split([self.hidden_size, *widths], dim=-1)
        states = {}
        for each, keys, values in zip(self.before, parts[::2], parts[1::2], strict=True):
            shape = (each.kv_heads, each.head_dim)
            states[each.key] = (keys.unflatten(-1, shape).transpose(1, 2), values.unflatten(-1, shape).transpose(1, 2))
        return hidden, states

    def pack(self, hidden: Tensor, states: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The hidden states behind the layer, with the keys and values for later layers behind them."""
        parts = [part.transpose(1, 2).flatten(2) for each in self.after for part in states[each.key]]
        return torch.cat([hidden, *parts], dim=-1) if parts else hidden


def shared_states(config: PreTrainedConfig) -> list[SharedStates]:
    """The layout at every layer; empty for a family whose layers share nothing."""
    architecture, config = lookup(config), text_config(config)
    if architecture is None or architecture.shares is None:
        return []
    left, layouts = architecture.shares.left(config), []
    carried: tuple[StatesShape, ...] = ()
    for own, key in zip(config.per_layer_config, left, strict=True):
        before = carried
        if key is not None:
            kept = tuple(each for each in carried if each.key != key)
            carried = (*kept, StatesShape(key, own.num_key_value_heads, own.head_dim))
        layouts.append((before, carried))
    layouts[-1] = (layouts[-1][0], ())
    widest = max(sum(each.numbers for each in before) for before, _ in layouts)
    argument, size = architecture.shares.argument, config.hidden_size
    return [SharedStates(argument, size, before, after, widest) for before, after in layouts]


def shared_in(arguments: Mapping[str, Any]) -> SharedStates | None:
    """The layout at the layer with these arguments; ``None`` for a family whose layers share nothing."""
    return next((value for value in arguments.values() if isinstance(value, SharedStates)), None)


def carried_width(config: PreTrainedConfig) -> int:
    """The most numbers per token that follow the hidden states between two layers."""
    layouts = shared_states(config)
    return layouts[0].widest if layouts else 0


def stream_width(config: PreTrainedConfig) -> int:
    """Numbers per token between two layers: the hidden size, and the most that follows it."""
    return text_config(config).hidden_size + carried_width(config)


def arguments_width(config: PreTrainedConfig) -> int:
    """Numbers per token of all arguments that differ by batch, in all layers."""
    architecture, config = lookup(config), text_config(config)
    fields = architecture.by_batch.values() if architecture is not None else ()
    return config.num_hidden_layers * sum(getattr(config, field) for field in fields)
