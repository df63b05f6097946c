"""Perplexity with its protocol."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.calibration.windows import prefix_ids
from slimgpt.errors import NumericalError, UsageError
from slimgpt.evaluation.divergence import Divergence, DivergenceMeter
from slimgpt.evaluation.loglikelihood import MAX_LOGITS
from slimgpt.io.result import Result
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.lookup import check_context, check_ids
from slimgpt.runtime.devices import dtype_name

BOS = ("auto", "once", "window")
"""Where the tokens stand that the tokenizer puts before a text: at its start, or at the start of every window.
``auto`` is ``window`` for the models below and ``once``, the literature's way, for all others."""

NEEDS_BOS_PER_WINDOW = ("gemma",)
"""How the names of model types begin that predict badly where a window does not start with BOS."""


@dataclass(frozen=True, repr=False)
class Perplexity(Result):
    """``exp`` of the mean negative log-likelihood per predicted token, and how it was taken.

    Args:
        perplexity: the number.
        word_perplexity: the same per word, for models of different tokenizers: ``exp`` of the mean per token times
            the text's tokens per word (what stands between white space).
        byte_perplexity: the same per byte of UTF-8.
        window: tokens per window; numbers at different windows do not compare.
        tokens: tokens of the text in all windows.
        predicted: tokens that were predicted: all of a window but its first and those an earlier window predicted.
        protocol: everything else that changes the number.
        by_position: by the first token position of a bucket, the perplexity of the tokens in it; only if asked for.
        divergence: of the predictions from another model's on the same tokens; only if asked for.
        log_stderr: standard error of the perplexity's logarithm, tokens taken as independent.
    """

    perplexity: float
    word_perplexity: float
    byte_perplexity: float
    window: int
    tokens: int
    predicted: int
    protocol: dict[str, Any]
    by_position: dict[int, float] | None = None
    divergence: Divergence | None = None
    log_stderr: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read the values of :meth:`to_json`, also from a JSON file."""
        by_position = values["by_position"]
        if by_position is not None:
            by_position = {int(first): value for first, value in by_position.items()}
        divergence = values.get("divergence")
        divergence = None if divergence is None else Divergence.from_json(divergence)
        return cls(**{**values, "by_position": by_position, "divergence": divergence})


def check_protocol(window: int, bos: str = "auto", max_tokens: int | None = None, batch_size: int = 8) -> None:
    """Refuse what no model and no text can be measured with.

    Raises:
        UsageError: a window that predicts nothing, an unknown ``bos``, or less than one token or window.
    """
    if bos not in BOS:
        raise UsageError(f"bos is '{bos}'; it must be one of {', '.join(BOS)}")
    if window < 2:
        raise UsageError(f"window {window} is too small: a window of n tokens predicts n - 1 of them")
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; it must be at least 1")


@torch.no_grad()
@in_eval_mode
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    *,
    stride: int | None = None,
    joining: str = "as in the file",
    by_position: bool = False,
    bos: str = "auto",
    against: PreTrainedModel | None = None,
    seed: int | None = None,
) -> Perplexity:
    """Perplexity of a text.

    The text is tokenised as a whole, the way the tokenizer does it by default, and cut into windows; what is left
    over at the end is not used. Without ``stride`` no token of the text is in two windows: with ``window`` 128 and
    2048 these are the two conventions of the literature.

    Args:
        window: tokens per window, at least 2.
        max_tokens: use only the first so many tokens.
        progress: called with windows done and windows in all.
        stride: tokens from one window to the next; only what the window before has not seen is predicted.
        joining: how the rows of the corpus became one text; goes into the protocol.
        by_position: also tell the perplexity by position in the window, in buckets that double.
        bos: one of :data:`BOS`.
        against: also tell the divergence from this model, which has the same tokenizer.
        seed: draws the token that the first window begins at: one that leaves room for ``max_tokens`` where these are
            fewer than the text has, else one of the first window's. Not given: the first token.

    Raises:
        UsageError: the window does not fit a model or the text, token ids are outside a model's vocabulary, an unknown
            ``bos``, or models with different vocabularies.
        NumericalError: the model gives NaN or infinity.
    """
    check_protocol(window, bos, max_tokens, batch_size)
    config = model.config.get_text_config(decoder=True)
    in_window = bos == "window" or (bos == "auto" and config.model_type.startswith(NEEDS_BOS_PER_WINDOW))
    where = "to every window" if in_window else "once for the whole text"
    prefix = prefix_ids(tokenizer) if in_window else []
    body = window - len(prefix)  # of the text in a window
    step = body if stride is None else stride
    if not 1 <= step <= body:
        raise UsageError(f"stride {step} must lie between 1 and the window's {body} tokens of text")
    all_ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    first = 0 if seed is None else _drawn_start(len(all_ids), max_tokens, body, seed)
    special = len(prefix_ids(tokenizer)) if first else 0
    used = torch.cat([all_ids[:special], all_ids[special + first :]])
    ids = (used if max_tokens is None else used[:max_tokens])[len(prefix) :]
    if len(ids) < body:
        raise UsageError(f"the text gives {len(ids):,} tokens, fewer than one window of {window}")
    for one in (model,) if against is None else (model, against):
        check_context(one.config, "a window", window)
        check_ids(all_ids, one.config.get_text_config(decoder=True).vocab_size, "the text")
    pieces = ids.unfold(0, body, step)  # (count, body)
    count = len(pieces)
    windows = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(count, -1), pieces], 1)
    predicted_here = torch.ones(count, window - 1, dtype=torch.bool)
    if step < window:
        predicted_here[1:, : window - 1 - step] = False
    # Logits are the largest thing here: keep a batch's under about 2^25 numbers.
    size = max(1, min(batch_size, MAX_LOGITS // (window * config.vocab_size)))
    sums, squares = torch.zeros(window - 1, dtype=torch.float64), 0.0
    meter = None if against is None else DivergenceMeter(against)
    for start in range(0, count, size):
        batch, chosen = windows[start : start + size].to(model.device), predicted_here[start : start + size]
        losses = _losses(model, batch) if meter is None else meter.add(model, batch, chosen)
        counted = losses.double().cpu().masked_fill_(~chosen, 0)
        sums, squares = sums + counted.sum(0), squares + float(counted.square().sum())
        if progress:
            progress(min(start + size, count), count)
    counts = predicted_here.sum(0)
    predicted = int(counts.sum())
    mean = float(sums.sum()) / predicted
    if not math.isfinite(mean):
        raise NumericalError(
            f"the model gives NaN or infinity as the probability of a token (dtype {model.dtype}); its weights are "
            "damaged, or too large for the type: try float32"
        )
    words, size_in_bytes = len(text.split()), len(text.encode())
    return Perplexity(
        perplexity=_exp(mean),
        word_perplexity=_exp(mean * len(all_ids) / max(words, 1)),
        byte_perplexity=_exp(mean * len(all_ids) / max(size_in_bytes, 1)),
        window=window,
        tokens=body + (count - 1) * step,
        predicted=predicted,
        protocol={
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text_tokens": len(all_ids),
            "text_words": words,
            "text_bytes": size_in_bytes,
            "joining": joining,
            "tokenizer": type(tokenizer).__name__,
            "vocabulary": len(tokenizer),
            "special_tokens": f"as the tokenizer adds them, {where}",
            "bos": tokenizer.bos_token_id is not None and int(windows[0, 0]) == tokenizer.bos_token_id,
            "stride": step,
            "overlap": body - step,
            "first_token_of_window_predicted": False,
            "max_tokens": max_tokens,
            "seed": seed,
            "skipped_tokens": first,
            "engine": getattr(model, "engine", f"transformers {transformers.__version__}"),
            "dtype": dtype_name(model.dtype),
            "device": model.device.type,
        },
        by_position=_buckets(sums / counts) if by_position else None,
        divergence=None if meter is None else meter.result(name_of(meter.base), len(all_ids) / max(size_in_bytes, 1)),
        log_stderr=math.sqrt(max(squares / predicted - mean**2, 0.0) / max(predicted - 1, 1)),
    )


def _drawn_start(text_tokens: int, max_tokens: int | None, body: int, seed: int) -> int:
    """Number of tokens of a text that a seed leaves out at its beginning.

    Args:
        body: tokens of the text in a window.
    """
    rest = 0 if max_tokens is None else text_tokens - max_tokens
    most = rest if rest > 0 else min(body - 1, max(text_tokens - body, 0))
    return random.Random(seed).randint(0, most)


def name_of(model: PreTrainedModel) -> str:
    """The name that a model was loaded by; its class for one that was not loaded."""
    return str(model.config.name_or_path or type(model).__name__)


def _losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The negative log-probability of every token but the first, ``(batch, window - 1)``, in nats.

    In fp64: sums over a vocabulary of tens of thousands drift in fp32 by more than a millionth. Window by window, and
    on a CPU token by token: what stays in its caches takes a third of the time.
    """
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    rows = 1 if logits.device.type == "cpu" else logits.shape[1]
    losses = [
        F.cross_entropy(piece.to(exact), labels, reduction="none")
        for window, target in zip(logits, ids[:, 1:])
        for piece, labels in zip(window.split(rows), target.split(rows))
    ]
    return torch.cat(losses).view(len(ids), -1)


def _buckets(means: Tensor) -> dict[int, float]:
    """Perplexity of positions 1, 2-3, 4-7, ...; the key is the first of them."""
    buckets, start = {}, 1
    while start <= len(means):
        buckets[start] = _exp(float(means[start - 1 : 2 * start - 1].mean()))
        start *= 2
    return buckets


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))
