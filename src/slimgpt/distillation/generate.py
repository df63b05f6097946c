"""Text that the dense model writes, for a training that takes more tokens than there are.

Tokens that come again are learned by heart; what the dense model writes is new, and shows more of what it predicts
(sequence-level distillation, arXiv 1606.07947). Every piece goes on from a few tokens of the calibration text, so that
it stays near to what that is about.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from slimgpt.errors import NumericalError
from slimgpt.layerwise.capture import patched_layers
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, running_layer
from slimgpt.layerwise.divergence import on_device
from slimgpt.models.build import decoder_layers
from slimgpt.models.lookup import layer_sizes, text_config
from slimgpt.planning.targets import CACHE_BYTES, cache_bytes
from slimgpt.runtime.memory import used_bytes

PROMPT_TOKENS = 16
"""So many tokens of the calibration text begin a piece, or half of it where that is less."""

MAX_BATCH = 256
"""At most so many pieces are written together: their logits are as many rows over the vocabulary."""

OnToken = Callable[[int, int, float], None]


class GeneratedText(NamedTuple):
    """Text that a model has written.

    Args:
        ids: ``(count, length)``.
        hidden: the hidden states behind the last layer, ``(count, length, hidden_size)``, as the layers ran; in a file
            of the scratch folder where memory is short.
    """

    ids: Tensor
    hidden: Tensor


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    count: int,
    length: int,
    seed: int,
    run: ExecutionContext,
    on_token: OnToken | None = None,
) -> GeneratedText:
    """Pieces of text, drawn from the dense model's predictions at temperature 1.

    Layers come to the device one after the other for every token, those that it has room for once.

    Args:
        model: what is around the layers; it stays as it is.
        load_layer: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)``; every piece begins with some tokens of one.
        seed: of the places they are taken from, and of what is drawn.
        on_token: called after every token of the pieces that are written together, with its number, the number of all
            and the seconds it took.

    Raises:
        NumericalError: predictions that are NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = min(PROMPT_TOKENS, length // 2, windows.shape[1])
    rows = torch.randint(len(windows), (count, 1), generator=generator)
    starts = torch.randint(windows.shape[1] - prompt + 1, (count, 1), generator=generator)
    prompts = windows[rows, starts + torch.arange(prompt)]
    # All at once: what is written does not depend on how many pieces there is room for.
    uniforms = torch.rand(count, length - prompt, generator=generator)
    layers, kept = decoder_layers(model), dict[int, nn.Module]()
    dtype = run.dtype or next(model.get_input_embeddings().parameters()).dtype
    shape = (count, length, text_config(model.config).hidden_size)
    hidden = activation_store_for(run, torch.Size(shape).numel() * dtype.itemsize)
    ids, behind, passed = windows.new_empty(shape[:2]), hidden.make(0, shape, dtype), Tensor()
    originals = list(layers)
    used = used_bytes(run.device)
    room = max(run.placement.budget - used, 0)

    def run_layer_of(index: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal passed
        layer = kept.get(index)
        if layer is None:
            stand_in, layers[index] = layers[index], originals[index]  # what is taken comes from there, or is made so
            layer = running_layer(load_layer(index), model.config, index, run)
            layers[index] = stand_in
            if used_bytes(run.device) < used + room // 3:
                kept[index] = layer
        returned = layer(*args, **kwargs)
        passed = returned[0] if isinstance(returned, tuple) else returned
        return returned

    numbers = {id(layer): index for index, layer in enumerate(originals)}
    together = _batch_size(model, length, room // 3, dtype)
    steps, done, caches = -(-count // together) * (length - prompt), 0, True
    with (
        on_device(model, run.device, run.dtype),
        patched_layers(layers, lambda layer: partial(run_layer_of, numbers[id(layer)])),
    ):
        for rows in (slice(first, first + together) for first in range(0, count, together)):
            known: dict[str, Any] = {}
            fresh = text = prompts[rows].to(run.device)
            while True:
                start = time.perf_counter()
                found = model(input_ids=fresh, use_cache=caches, **known)
                behind[rows, text.shape[1] - fresh.shape[1] : text.shape[1]] = passed
                if text.shape[1] == length:
                    break
                place = text.shape[1] - prompt
                fresh = _draw(model, found.logits[:, -1], uniforms[rows, place : place + 1].to(run.device))
                text = torch.cat([text, fresh], dim=1)
                if caches := "past_key_values" in found:
                    known = {"past_key_values": _preallocated(found["past_key_values"], length)}
                else:  # what keeps no cache, or one of its own, reads all again
                    fresh = text
                if on_token:
                    on_token(done, steps, time.perf_counter() - start)
                done += 1
            ids[rows] = text.to(ids)
    return GeneratedText(ids, behind)


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values of a layer, with room for all that are to come: a cache that grows is copied for every token,
    which costs more the more pieces are written together.

    Args:
        states: what is known, ``(pieces, heads, tokens, head_dim)`` of keys and of values.
        length: so many tokens.
    """

    def __init__(self, states: tuple[Tensor, Tensor], length: int):
        super().__init__()
        self.lazy_initialization(*states)
        self.rooms = [known.new_empty((*known.shape[:2], length, known.shape[3])) for known in states]
        self.keys, self.values = (room[:, :, :0] for room in self.rooms)
        self.update(*states)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        for room, fresh in zip(self.rooms, (key_states, value_states)):
            room[:, :, before:after] = fresh
        self.keys, self.values = (room[:, :, :after] for room in self.rooms)
        return self.keys, self.values


def _preallocated(cache: Any, length: int) -> Any:
    """A cache whose layers have room for so many tokens, where they would grow; what keeps something else stays."""
    for index, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[index] = PreallocatedCacheLayer((layer.keys, layer.values), length)
    return cache


def _batch_size(model: PreTrainedModel, length: int, room: int, dtype: torch.dtype) -> int:
    """How many pieces are written together: their keys and values must find room.

    Args:
        room: bytes.
    """
    heads = [sizes["num_key_value_heads"] for sizes in layer_sizes(model.config)]
    cache = cache_bytes(text_config(model.config), heads, length) * dtype.itemsize // CACHE_BYTES
    return min(max(room // max(cache, 1), 1), MAX_BATCH)


def _draw(model: PreTrainedModel, logits: Tensor, uniforms: Tensor) -> Tensor:
    """The next token of every piece, ``(pieces, 1)``.

    Args:
        logits: ``(pieces, vocabulary)``.
        chances: between 0 and 1, ``(pieces, 1)``: which share of the predictions, in the order of the vocabulary, is
            below the token.
    """
    logits, ended = logits.float(), text_config(model.config).eos_token_id
    for token in ended if isinstance(ended, list) else [ended]:
        if token is not None and token < logits.shape[-1]:
            logits[:, token] = float("-inf")  # a piece goes on to its end
    below = logits.softmax(-1).cumsum(-1)  # of a vocabulary this is several times faster than torch.multinomial
    if bool(torch.isnan(below[:, -1].sum())):
        raise NumericalError("the dense model's predictions hold NaN or infinity on text of its own")
    return torch.searchsorted(below, uniforms * below[:, -1:], right=True).clamp_max(below.shape[-1] - 1)
