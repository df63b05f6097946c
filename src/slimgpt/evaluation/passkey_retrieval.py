"""Pass-key retrieval from long texts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError
from slimgpt.evaluation.loglikelihood import log_likelihoods
from slimgpt.models.lookup import check_context

FILLER = "A cart goes up the hill. A boat goes down the river. The wind turns, and both come home. "
NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"
DEPTHS = 5


@dataclass(frozen=True)
class Passkey:
    """Shares of numbers hidden in long texts that the model gives back.

    Args:
        found: by length of the text in tokens, the share of numbers that greedy decoding gives back whole.
        by_depth: by length, the same by depth, from the beginning of the text to its end.
        protocol: the texts and how many there were.
    """

    found: dict[int, float]
    by_depth: dict[int, list[float]]
    protocol: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read the values of :meth:`to_json`, also from a JSON file."""
        by_length = {key: {int(n): value for n, value in values[key].items()} for key in ("found", "by_depth")}
        return cls(**{**values, **by_length})


def passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    trials: int = 4,
    seed: int = 0,
    on_start: Callable[[int], Callable[[int], None]] | None = None,
) -> Passkey:
    """Hide a number of five digits in a text that says nothing, and ask for it at the end.

    Args:
        lengths: tokens of the text and its question.
        trials: numbers for every length and depth.
        on_start: told how many questions there are; gives what is called with the number answered since.

    Raises:
        UsageError: a length is too short for the question, or longer than the model's context.
    """
    draw = random.Random(seed)
    requests, places = [], []
    for length in lengths:
        check_context(model.config, "a text", length)
        for depth in range(DEPTHS):
            for _ in range(trials):
                requests.append(_question(tokenizer, length, depth / (DEPTHS - 1), draw.randrange(10_000, 100_000)))
                places.append((length, depth))
    progress = on_start(len(requests)) if on_start else None
    answers = [same for _, same in log_likelihoods(model, requests, max(lengths), progress)]
    by_depth = {
        length: [
            sum(right for right, place in zip(answers, places) if place == (length, depth)) / trials
            for depth in range(DEPTHS)
        ]
        for length in lengths
    }
    return Passkey(
        found={length: sum(shares) / DEPTHS for length, shares in by_depth.items()},
        by_depth=by_depth,
        protocol={"filler": FILLER, "needle": NEEDLE, "question": QUESTION, "trials": trials, "seed": seed},
    )


def _question(tokenizer: PreTrainedTokenizerBase, length: int, depth: float, key: int) -> tuple[list[int], list[int]]:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    start = list(tokenizer("", verbose=False)["input_ids"])  # nothing, or the token that every text begins with
    needle, question, answer = ids(NEEDLE.format(key=key)), ids(QUESTION), ids(f" {key}")
    room = length - len(start) - len(needle) - len(question) - len(answer)
    if room < 1:
        least = length - room + 1
        raise UsageError(f"a text of {length} tokens has no room for the question; take {least} or more")
    filler = ids(FILLER)
    filler = filler * (room // len(filler) + 1)
    before = int(depth * room)
    return [*start, *filler[:before], *needle, *filler[before:room], *question], answer
