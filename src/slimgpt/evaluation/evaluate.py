"""Perplexity of a loaded model on a text, and its divergence from another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError
from slimgpt.evaluation.corpora import Text, read_text
from slimgpt.evaluation.llama_cpp import choose_engine, load_gguf
from slimgpt.evaluation.perplexity import Perplexity, perplexity
from slimgpt.models.loading import load


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | Text,
    *,
    window: int = 128,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 8,
    data_dir: str | Path | None = None,
    by_position: bool = False,
    bos: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    against: PreTrainedModel | str | None = None,
    seed: int | None = None,
) -> Perplexity:
    """Perplexity of a model on a text; see :func:`slimgpt.evaluation.perplexity` for the protocol.

    Args:
        model: as :func:`slimgpt.load` gives it, or, of a GGUF file in llama.cpp, :func:`slimgpt.evaluation.load_gguf`.
        text: the path of a text file; ``wikitext2``, ``ptb`` or ``c4``; ``demo`` (the held-out speeches); or a result
            of :func:`slimgpt.evaluation.read_text`.
        data_dir: where the named corpora are files; from the hub if not given.
        against: the dense model, or its name; the result's ``divergence`` is then ``KL(against || model)`` on the same
            tokens. Both models are in memory; logits are there for one batch at a time.
        seed: draws where the first window begins; not given: at the first token.

    Raises:
        UsageError: the text cannot be read, the window does not fit, or the two models' tokens differ.
    """
    source = read_text(str(text), data_dir) if isinstance(text, (str, Path)) else text
    if not isinstance(source, Text):
        raise UsageError(f"text is a {type(text).__name__}; give the path of a text file, wikitext2, ptb, c4 or demo")
    if isinstance(against, str):
        in_llama_cpp = choose_engine(against, "auto") == "llama.cpp"
        against, base_tokenizer = load_gguf(against) if in_llama_cpp else load(against, device=str(model.device))
        check_same_tokens(tokenizer, base_tokenizer, source.content)
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
        against=against,
        seed=seed,
    )


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse two tokenizers that make different tokens of a text.

    Raises:
        UsageError: they do.
    """
    ids, base_ids = (one(text, verbose=False)["input_ids"] for one in (tokenizer, base))
    if ids != base_ids:
        raise UsageError(
            f"the two models' tokenizers make other tokens of the text ({len(ids):,} and {len(base_ids):,}); "
            "a divergence is between predictions of the same tokens: give the model that this one was pruned from"
        )
