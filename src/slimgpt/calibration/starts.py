"""Beginnings of the documents that a model writes to calibrate on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources

from transformers import PreTrainedTokenizerBase

from slimgpt.calibration.batch_generation import Start, TurnTokens
from slimgpt.calibration.openings import OPENINGS, OTHER_LANGUAGES, QUESTIONS

CHAT_TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
"""Of the conversations in turn."""

TEXT_TEMPERATURE = 0.9
"""Of the texts."""

OTHER_LANGUAGE_SHARE = 1 / 8
"""Share of the texts that begin in another language than English."""

PASSAGES_OF_THREE = 2
"""Of three texts so many begin with a passage; the others with a few words."""

NO_OPENING_SHARE = 1 / 4
"""Share of a base model's texts that begin with nothing but the first token."""

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")
"""Special tokens that stand between documents in pretraining, by the names they have. Chat models often have another
token as end of sequence, and none as its beginning; behind a separator they go on as their base model did."""


@lru_cache(maxsize=1)
def passages() -> tuple[str, ...]:
    """Beginnings of documents, some forty words each, that break off: articles, news, reviews, stories, papers, code.

    They say in which manner a text is to go on, where a few words leave a chat model to its own. All were written for
    this package.
    """
    text = resources.files("slimgpt.assets").joinpath("passages.txt").read_text(encoding="utf-8")
    return tuple(text.removesuffix("\n").split("\n%%\n"))


def separator(tokenizer: PreTrainedTokenizerBase, vocabulary: int | None = None) -> int | None:
    """The token that stands between documents, if the vocabulary has one; else the one a text starts or ends with.

    Args:
        vocabulary: rows of the model's embedding. transformers gives tokenizers of GGUF files an ``<|endoftext|>``
            behind them where the file has none.
    """
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in SEPARATORS:
        if name in special and (vocabulary is None or special[name] < vocabulary):
            return special[name]
    first = tokenizer.bos_token_id
    return first if first is not None else tokenizer.eos_token_id  # type: ignore[return-value]


class Starts:
    """Beginnings of documents: conversations where there is a template, and texts.

    Args:
        prefix: what the tokenizer puts before every text.
        turns: of the chat template.
        longest: tokens that a text begins with at most.
        seed: of all that is chosen.
        vocabulary: rows of the model's embedding.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prefix: Sequence[int],
        turns: TurnTokens | None,
        longest: int,
        seed: int,
        vocabulary: int | None = None,
    ):
        self.tokenizer, self.turns, self.longest, self.seed = tokenizer, turns, longest, seed
        between = separator(tokenizer, vocabulary)
        self.begin = tuple(prefix) or (() if between is None else (between,))
        chooser = random.Random(f"{seed} openings")
        self.passages = chooser.sample(passages(), len(passages()))
        few_words = [opening for domain in OPENINGS.values() for opening in domain]
        self.few_words = chooser.sample(few_words, len(few_words))

    def __call__(self, first: int, count: int) -> list[Start]:
        """Those of some documents.

        Args:
            first: how many documents begin before these; a passage, or a few words, come again only when all have come.
        """
        chooser = random.Random(f"{self.seed} {first}")
        make: Callable[[int, random.Random], Start] = self._text if self.turns is None else self._either
        return [make(number, chooser) for number in range(first, first + count)]

    def ids(self, text: str) -> list[int]:
        """A text's tokens without those that every text starts with."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _either(self, number: int, chooser: random.Random) -> Start:
        """A conversation and a text in turn."""
        if number % 2:
            return self._text(number // 2, chooser)
        assert self.turns is not None
        opening = chooser.choice(QUESTIONS) if chooser.random() < 0.5 else ""
        temperature = CHAT_TEMPERATURES[number // 2 % len(CHAT_TEMPERATURES)]
        return Start("chat", (*self.turns.before, *self.ids(opening)), temperature)

    def _text(self, number: int, chooser: random.Random) -> Start:
        if self.turns is None and self.begin and chooser.random() < NO_OPENING_SHARE:
            return Start("text", self.begin, TEXT_TEMPERATURE)
        if chooser.random() < OTHER_LANGUAGE_SHARE:
            opening = chooser.choice(chooser.choice(list(OTHER_LANGUAGES.values())))
        elif number % 3 < PASSAGES_OF_THREE:
            opening = self.passages[(number // 3 * PASSAGES_OF_THREE + number % 3) % len(self.passages)]
        else:
            opening = self.few_words[number // 3 % len(self.few_words)]
        return Start("text", (*self.begin, *self.ids(opening))[: self.longest], TEXT_TEMPERATURE)


def starts_digest() -> str:
    """SHA-256 of all that beginnings are chosen from."""
    texts = [passages(), OPENINGS, OTHER_LANGUAGES, QUESTIONS]
    return hashlib.sha256(json.dumps([*texts, CHAT_TEMPERATURES, TEXT_TEMPERATURE]).encode()).hexdigest()
