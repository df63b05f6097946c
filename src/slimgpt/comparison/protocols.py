"""Protocols of a comparison's figures, as JSON values and in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimgpt.evaluation.samples import NEW_TOKENS

if TYPE_CHECKING:
    from slimgpt.comparison.result import Comparison


def protocols(comparison: Comparison) -> dict[str, Any]:
    """The protocols of the base's measurements; those of the slim models are the same."""
    base = comparison.sides[0]
    return {
        "perplexity": [{"text": Path(t).name, "window": p.window, **p.protocol} for t, p in base.perplexities],
        "tasks": base.tasks and base.tasks.protocol,
        "pass key": base.passkey and base.passkey.protocol,
        "speed": comparison.timings and comparison.timings.protocol,
    }


def in_words(comparison: Comparison) -> list[str]:
    """A sentence or two for every kind of figure that was taken."""
    return list(_sentences(comparison))


def _sentences(comparison: Comparison) -> Iterator[str]:
    base = comparison.sides[0]
    for text, result in base.perplexities:
        how = result.protocol
        yield (
            f"Perplexity on {Path(text).name}: the first {result.tokens:,} of {how['text_tokens']:,} tokens in windows "
            f"of {result.window} that do not overlap; {result.predicted:,} tokens are predicted, the first of a window "
            f"is not. Rows joined: {how['joining']}. {how['dtype']} on {how['device']}, {how['engine']}."
        )
    if any(result.divergence for side in comparison.sides for _, result in side.perplexities):
        yield (
            f"KL is the divergence of a slim model's predictions of those tokens from {base.name}'s, over the whole "
            "vocabulary in fp64; its standard error takes tokens as independent."
        )
    if base.tasks is not None:
        how = base.tasks.protocol
        rows = f"the first {comparison.wanted.limit} rows of each" if comparison.wanted.limit else "all rows"
        shots = ", ".join(f"{task} {count}" for task, count in how["num_fewshot"].items())
        template = "Through the" if how.get("chat_template") else "No"
        yield (
            f"Tasks: {how['harness']}, {rows}, from {how['rows_from']}; examples before a question: {shots}. "
            f"{template} chat template. {how['dtype']}. A difference's standard error is that of the differences "
            "question by question."
        )
    if base.by_position is not None:
        yield f"Long texts: perplexity by position in windows of {base.by_position.window} tokens of the first text."
    if base.passkey is not None:
        depths = len(next(iter(base.passkey.by_depth.values())))
        yield (
            f"Pass key: a number of five digits at {depths} depths of a text that says nothing, "
            f"{base.passkey.protocol['trials']} times each; found if it is the most likely answer."
        )
    if any(side.samples for side in comparison.sides):
        yield (
            f"Texts: at most {NEW_TOKENS} tokens, always the most likely one; through the chat template where there is "
            "one."
        )
    if comparison.timings is not None:
        how = comparison.timings.protocol
        yield (
            f"Speed: {how['prompt']} tokens are read and {how['new_tokens']} written, {how['rounds']} rounds, "
            f"{how['order']}; {how['dtype']} on {how['device']}, {how['threads']} threads, "
            f"{how['processors']} processors."
        )
