"""Perplexity with its protocol."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood per predicted token, and how it was taken.

    Args:
        perplexity: the number.
        window: tokens per window; numbers at different windows do not compare.
        tokens: tokens in all windows; each window predicts all of its tokens but the first.
        predicted: tokens that were predicted.
        protocol: everything else that changes the number.
    """

    perplexity: float
    window: int
    tokens: int
    predicted: int
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a text.

    The text is tokenised as a whole, the way the tokenizer does it by default, and cut into windows that do not
    overlap; what is left over at the end is not used. ``--window 128`` and ``2048`` are the two conventions of the
    literature for WikiText-2.

    Args:
        window: tokens per window, at least 2.
        max_tokens: use only the first so many tokens.
        progress: called with windows done and windows in all.

    Raises:
        UsageError: the window does not fit the model or the text.
    """
    if window < 2:
        raise UsageError(f"window {window} is too small: a window of n tokens predicts n - 1 of them")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    if max_tokens is not None:
        ids = ids[:max_tokens]
    count = len(ids) // window
    if count == 0:
        raise UsageError(f"the text gives {len(ids):,} tokens, fewer than one window of {window}")
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise UsageError(f"window {window} is longer than the model's context of {longest} tokens")
    windows = ids[: count * window].view(count, window)
    # Logits are the largest thing here: keep a batch's under about 2^25 numbers.
    size = max(1, min(batch_size, (1 << 25) // (window * model.config.vocab_size)))
    total = 0.0
    for start in range(0, count, size):
        batch = windows[start : start + size].to(model.device)
        total += float(_loss(model, batch))
        if progress:
            progress(min(start + size, count), count)
    predicted = count * (window - 1)
    return Perplexity(
        perplexity=math.exp(min(total / predicted, 700.0)),
        window=window,
        tokens=count * window,
        predicted=predicted,
        protocol={
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text_tokens": len(ids),
            "tokenizer": type(tokenizer).__name__,
            "special_tokens": "as the tokenizer adds them, once for the whole text",
            "stride": window,
            "first_token_of_window_predicted": False,
            "max_tokens": max_tokens,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
        },
    )


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The summed negative log-likelihood of all tokens but each row's first, in fp32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
