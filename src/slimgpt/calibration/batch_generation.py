"""Sampling of many documents at once from a model that is whole in memory.

All sequences of a batch have the same length at every step, so that neither padding nor a mask is needed: a sequence
begins with tokens of its own that are forced one by one, and where its question ends, the tokens that the chat template
puts in front of the answer are forced too. Finished sequences leave the batch and its key-value cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from slimgpt.models.kv_cache import preallocated
from slimgpt.models.sampling import draw

OnGenerated = Callable[[int, int, float], None]
"""Called after every token of a batch with its number, the number of all and the seconds it took."""

COMPACT_SHARE = 0.8
"""Finished sequences leave the cache once no more than this share of its rows is written on: to leave costs a copy."""

LEAST_QUESTION, LEAST_ANSWER, LEAST_TEXT = 4, 1, 16
"""Tokens that a question, an answer and a text have at least: before that, no special token is sampled."""

MAX_QUESTION = 96
"""Tokens after which a question is over, whether or not the model ended it."""


@dataclass(frozen=True)
class Start:
    """The beginning of a document.

    Args:
        kind: ``chat`` or ``text``.
        tokens: those it begins with, at least one.
        temperature: of what is sampled.
    """

    kind: str
    tokens: tuple[int, ...]
    temperature: float


@dataclass(frozen=True)
class TurnTokens:
    """Tokens that a chat template puts before a question, between question and answer, and behind the answer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    behind: tuple[int, ...]


@dataclass
class GeneratedDocument:
    """A document while it is written.

    Args:
        ids: its tokens, forced ones included.
        forced: tokens that come next whatever the model predicts.
        answering: whether its question is over.
        sampled: tokens sampled since the last forced one.
        own: the number of all sampled tokens.
        ended: whether the model ended it, rather than the limit of its length.
    """

    start: Start
    ids: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    answering: bool = False
    sampled: int = 0
    own: int = 0
    ended: bool = False

    @property
    def least(self) -> int:
        """Tokens to be sampled before a special one may end this part of it."""
        if self.start.kind == "text":
            return LEAST_TEXT
        return LEAST_ANSWER if self.answering else LEAST_QUESTION

    def add(self, sampled: int, special: frozenset[int], turns: TurnTokens | None) -> None:
        """Add the forced token, if there is one, or the sampled one."""
        if self.forced:
            self.ids.append(self.forced.pop(0))
            return
        if self.start.kind == "text" or self.answering:
            self.ended = sampled in special
            if self.ended:
                return
        elif sampled in special or self.sampled >= MAX_QUESTION:  # the sampled token is left out
            assert turns is not None
            self.forced, self.answering, self.sampled = list(turns.between), True, 0
            self.ids.append(self.forced.pop(0))
            return
        self.ids.append(sampled)
        self.sampled += 1
        self.own += 1


@torch.inference_mode()
def generate_documents(
    model: PreTrainedModel,
    starts: Sequence[Start],
    uniforms: Tensor,
    *,
    special: frozenset[int],
    turns: TurnTokens | None = None,
    on_generated: OnGenerated | None = None,
) -> list[GeneratedDocument]:
    """Documents sampled from a model, one for each start and in their order.

    Args:
        model: whole, on one device, in eval mode.
        uniforms: between 0 and 1, ``(documents, length)``: what is drawn; no document gets longer.
        special: tokens that end a question, an answer or a text; they are not part of it.
        turns: of the chat template, where a start is of the kind ``chat``.

    Raises:
        NumericalError: predictions that are NaN or infinite.
    """
    device = next(model.get_input_embeddings().parameters()).device
    documents = [GeneratedDocument(start, forced=list(start.tokens)) for start in starts]
    for document in documents:
        document.add(-1, special, turns)
    length, uniforms = uniforms.shape[1], uniforms.to(device)
    ends = torch.tensor(sorted(special), device=device, dtype=torch.long)
    rows = list(range(len(documents)))  # the document in each row of the batch
    cache: Any = None
    for step in range(1, length):
        begin = time.perf_counter()
        tokens = [documents[row].ids[-1:] if step == 1 or cache is not None else documents[row].ids for row in rows]
        known = {} if cache is None else {"past_key_values": cache}
        output = model(input_ids=torch.tensor(tokens, device=device), use_cache=step == 1 or cache is not None, **known)
        cache = output.get("past_key_values")  # what keeps no cache, or one of its own, reads all again
        if step == 1:
            cache = preallocated(cache, length)
        free = torch.tensor([documents[row].sampled >= documents[row].least for row in rows], device=device)
        temperatures = torch.tensor([documents[row].start.temperature for row in rows], device=device)
        logits = output["logits"][:, -1].float() / temperatures[:, None]
        logits[:, ends] = logits[:, ends].masked_fill(~free[:, None], float("-inf"))
        for row, token in zip(rows, draw(logits, uniforms[rows, step]).tolist()):
            if not documents[row].ended:
                documents[row].add(token, special, turns)
        alive = [place for place, row in enumerate(rows) if not documents[row].ended]
        if on_generated:
            on_generated(step - 1, length - 1, time.perf_counter() - begin)
        if not alive:
            break
        if cache is None or (len(alive) <= COMPACT_SHARE * len(rows) and _drops_rows(cache)):
            if cache is not None:
                cache.batch_select_indices(torch.tensor(alive, device=device))
            rows = [rows[place] for place in alive]
    return documents


def _drops_rows(cache: Any) -> bool:
    """Whether sequences can be taken out of a cache; states of linear attention and convolutions stay whole."""
    return all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", [None]))


def folded_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of one new token with grouped queries, folded into rows of one product for each KV head.

    PyTorch's kernel for grouped queries takes four times as long on a CPU in bfloat16. The arguments and the result
    are those of an attention function of transformers.
    """
    batch, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    if tokens > 1 or groups == 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = query.reshape(batch, key.shape[1], groups, width)
    output = functional.scaled_dot_product_attention(rows, key, value, scale=kwargs.get("scaling"))
    return output.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register("slimgpt_folded", folded_attention)
AttentionMaskInterface.register("slimgpt_folded", sdpa_mask)


@contextmanager
def folded_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """A model on a CPU with :func:`folded_attention` in place of PyTorch's, if it uses that, while the block runs."""
    before = model.config._attn_implementation
    on_cpu = next(model.get_input_embeddings().parameters()).device.type == "cpu"
    if before != "sdpa" or not on_cpu or not model._can_set_attn_implementation():
        yield
        return
    model.set_attn_implementation("slimgpt_folded")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def parameters_moved(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """A model's tensors on another device, its parameters in another type, while the block runs; then as before.

    Buffers keep their type: rotary frequencies must not be rounded. Every tensor gets back the memory it had.
    """
    before = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
