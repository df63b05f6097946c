"""Protocols of a comparison's figures, as JSON values and in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimgpt.evaluation.samples import NEW_TOKENS

if TYPE_CHECKING:
    from slimgpt.comparison.model_result import ModelResult
    from slimgpt.comparison.result import Comparison


KINDS = {"rows": "the rows that are asked", "examples": "the examples before a question", "tokens": "sampled tokens"}
"""What a seed changes of tasks, in words."""


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
        start = "the first " if how.get("seed") is None else ""
        drawn = "" if how.get("seed") is None else ", from one on that the seed draws,"
        yield (
            f"Perplexity on {Path(text).name}: {start}{result.tokens:,} of {how['text_tokens']:,} tokens{drawn} in "
            f"windows of {result.window} that do not overlap; {result.predicted:,} tokens are predicted, the first of "
            f"a window is not. Rows joined: {how['joining']}. {how['dtype']} on {how['device']}, {how['engine']}."
        )
    if any(result.divergence for side in comparison.sides for _, result in side.perplexities):
        yield (
            f"KL is the divergence of a slim model's predictions of those tokens from {base.name}'s, over the whole "
            "vocabulary in fp64; its standard error takes tokens as independent."
        )
    if base.tasks is not None:
        how = base.tasks.protocol
        chosen = "first" if base.seed is None else "drawn"
        rows = f"the {chosen} {comparison.wanted.limit} rows of each" if comparison.wanted.limit else "all rows"
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
    yield from _of_repeats(comparison)
    if comparison.timings is not None:
        how = comparison.timings.protocol
        yield (
            f"Speed: {how['prompt']} tokens are read and {how['new_tokens']} written, {how['rounds']} rounds, "
            f"{how['order']}; {how['dtype']} on {how['device']}, {how['threads']} threads, "
            f"{how['processors']} processors."
        )


def _of_repeats(comparison: Comparison) -> Iterator[str]:
    """The part of the protocol about seeds and several models of a column."""
    seeds, base = comparison.wanted.seeds, comparison.sides[0]
    if seeds > 1:
        changed = [f"the token at which the first window of a text begins ({_begins(base)})"]
        if base.tasks is not None:
            kinds = [KINDS[kind] for kind in base.tasks.protocol["seeded"]]
            of_tasks = ", ".join(kinds) if kinds else "nothing, so that they were asked once"
            changed.append(f"of these tasks {of_tasks}")
        changed += ["the numbers of the pass key"] if base.passkey is not None else []
        yield (
            f"Seeds: texts, tasks and pass keys were measured {seeds} times, with seeds 0 to {seeds - 1}. A seed "
            f"changes {'; '.join(changed)}. All models get the same draws; texts that they write and speed are of one "
            "run."
        )
    for side in comparison.sides:
        folders = list(dict.fromkeys(run.folder for run in side.runs))
        if len(folders) > 1:
            yield (
                f"{side.name} is {len(folders)} models, {', '.join(folders)}; speed, bytes and texts are the first "
                "one's. Errors of its differences have the standard error of the mean over these models in them."
            )


def _begins(base: ModelResult) -> str:
    """The first token of the first window of every text, by seed."""
    places = []
    for index, (text, result) in enumerate(base.perplexities):
        starts = [str(run.perplexities[index][1].protocol["skipped_tokens"]) for run in base.runs]
        places.append(f"{Path(text).name} at window {result.window}: {', '.join(starts)}")
    return "; ".join(places)
