"""A model with its cache as a function of tensors alone, which converters can trace; for layers of any widths."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from slimgpt.errors import ExportError
from slimgpt.exporting.source import ExportSource
from slimgpt.planning.engines import graph_problem


def check_graph(exported: ExportSource) -> None:
    """Refuse a model that cannot become a graph.

    Raises:
        ExportError: with the reason.
    """
    if (problem := graph_problem(exported.config)) is not None:
        raise ExportError(f"{exported.source.name} cannot become a graph: {problem}")


def window_inputs(ids: list[int]) -> dict[str, np.ndarray]:
    """The inputs of a graph before its cache, for a window with nothing before it."""
    return {
        "input_ids": np.array([ids], dtype=np.int64),
        "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
    }


class DecoderGraph(nn.Module):
    """A causal LM whose cache comes in and goes out as tensors ``(batch, heads, tokens, head size)``, two a layer.

    Args:
        model: in float32.
        beams: whether an input ``beam_idx`` says which row of the cache each row goes on from.

    Attributes:
        input_names: names of the inputs before the cache.
        cached: the layers that have keys and values; those without attention have none.
        cache_sizes: heads and head size of each one's keys and values, in turn.
        past_names: names of the tensors of the cache that come in.
        present_names: of those that go out.

    Raises:
        ExportError: a layer keeps something else than keys and values.
    """

    def __init__(self, model: PreTrainedModel, beams: bool = False):
        super().__init__()
        self.model, self.beams = model.eval(), beams
        self.input_names = ["input_ids", "attention_mask", "position_ids", *(["beam_idx"] if beams else [])]
        with torch.no_grad():
            cache = model(torch.zeros(1, 2, dtype=torch.long), use_cache=True).past_key_values
        self.cache_sizes: list[tuple[int, int]] = []
        self.cached: list[int] = []
        for index, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer:
                raise ExportError(f"a layer's cache is a {type(layer).__name__}, not keys and values of all tokens")
            if layer.keys is None or layer.values is None:  # a layer without attention
                continue
            self.cached.append(index)
            self.cache_sizes += [(part.shape[1], part.shape[3]) for part in (layer.keys, layer.values)]
        both = [(index, part) for index in self.cached for part in ("key", "value")]
        self.past_names = [f"past_key_values.{index}.{part}" for index, part in both]
        self.present_names = [f"present.{index}.{part}" for index, part in both]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Logits ``(batch, tokens, vocabulary)`` and the longer cache.

        Args:
            input_ids: new tokens ``(batch, tokens)``.
            attention_mask: 1 where a token counts, ``(batch, tokens before and new)``.
            position_ids: of the new tokens, ``(batch, tokens)``.
            rest: ``beam_idx`` ``(batch,)`` if there are beams, then the cache.
        """
        past = [part.index_select(0, rest[0]) for part in rest[1:]] if self.beams else list(rest)
        cache = DynamicCache()
        layers = [DynamicLayer() for _ in range(self.cached[-1] + 1)]
        for index, keys, values in zip(self.cached, past[::2], past[1::2]):
            layer = layers[index]
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.extend(layers)
        total, new = attention_mask.shape[1], input_ids.shape[1]
        causal = torch.arange(total)[None, :] <= torch.arange(new)[:, None] + (total - new)
        seen = causal[None, None] & attention_mask[:, None, None, :].bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        output = self.model(
            input_ids=input_ids,
            attention_mask=mask,  # as it is: making one does not trace
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        kept = [output.past_key_values.layers[index] for index in self.cached]
        longer = [part for layer in kept for part in (layer.keys, layer.values)]
        return output.logits, *longer

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with: two rows of four new tokens after three, no size equal to another by chance."""
        past = [torch.zeros(2, heads, 3, size) for heads, size in self.cache_sizes]
        ids, seen, positions = (torch.ones(2, length, dtype=torch.long) for length in (4, 7, 4))
        positions = positions.cumsum(1) + 2
        return ids, seen, positions, *([torch.arange(2)] if self.beams else []), *past
