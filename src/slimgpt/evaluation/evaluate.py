"""Perplexity of a loaded model on a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.evaluation.corpora import Text, read_text
from slimgpt.evaluation.perplexity import Perplexity, perplexity


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Text,
    *,
    window: int = 128,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    data_dir: str | Path | None = None,
    by_position: bool = False,
    bos: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on a text; see :func:`slimgpt.evaluation.perplexity` for the protocol.

    Args:
        text: the path of a text file; ``wikitext2``, ``ptb`` or ``c4``; ``demo`` (the held-out speeches); or a result
            of :func:`slimgpt.evaluation.read_text`.
        data_dir: where the named corpora are files; from the hub if not given.

    Raises:
        UsageError: the text cannot be read, or the window does not fit.
    """
    source = read_text(text, data_dir) if isinstance(text, str) else text
    limits = [n for n in (max_tokens, source.max_windows and source.max_windows * window) if n is not None]
    limit = min(limits) if limits else None
    return perplexity(
        model,
        tokenizer,
        source.content,
        window,
        limit,
        batch_size,
        progress,
        stride=stride,
        joining=source.joining,
        by_position=by_position,
        bos=bos,
    )
