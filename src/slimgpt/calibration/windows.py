"""Equal-length windows of token ids, unpadded and seeded."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt.calibration.documents import Conversation, Document, Instruction, read_documents, read_rows, shuffled
from slimgpt.config import PruneConfig
from slimgpt.errors import CalibrationError, ChatTemplateError
from slimgpt.models.chat_template import render_chat
from slimgpt.models.lookup import check_ids

Read = TypeVar("Read")
Calibration = str | Tensor | Iterable[object]
"""A source by its name, token ids, or texts and rows in memory."""

CHARACTERS = 16
"""Characters for a token, more than a text takes on average."""

ROOM = 64
"""Tokens at the end of a piece that is cut off which may differ from those of the whole text."""


class CalibrationText(NamedTuple):
    """Calibration windows, and text of the same source that is in none of them.

    Args:
        windows: token ids, ``(num_samples, seq_len)``.
        source: the name of where they come from.
        held_out: token ids that follow the windows, without the special tokens of their starts, ``(tokens,)``; empty
            where the text has no more, or none were asked for.
    """

    windows: Tensor
    source: str
    held_out: Tensor


def sample_windows(
    tokenizer: PreTrainedTokenizerBase, source: str, num_samples: int, seq_len: int, seed: int = 0
) -> Tensor:
    """Calibration windows from a source of text, ``(num_samples, seq_len)`` long.

    Documents are shuffled by the seed, tokenised until there are enough tokens, joined with the tokenizer's end
    token, and cut. Where the tokenizer starts every text with a special token, every window starts with it too,
    since some models (Gemma) compute nonsense without it.

    Raises:
        CalibrationError: unreadable text, or too little of it.
    """
    documents = shuffled(read_documents(source), seed)
    return cut_windows(tokenizer, documents, num_samples, seq_len, source)


def cut_windows(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], num_samples: int, seq_len: int, source: str
) -> Tensor:
    """Windows from documents in the order given; see :func:`sample_windows`.

    Raises:
        CalibrationError: too little text, or a chat template that refuses more than half of the conversations.
    """
    return cut_text(tokenizer, documents, num_samples, seq_len, source).windows


def cut_text(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    num_samples: int,
    seq_len: int,
    source: str,
    held_out: int = 0,
) -> CalibrationText:
    """Windows as :func:`cut_windows` makes them, and at most ``held_out`` tokens of the text behind them.

    Raises:
        CalibrationError: as :func:`cut_windows`.
    """
    documents = iter(documents)
    prefix = prefix_ids(tokenizer)
    body = seq_len - len(prefix)
    if body < 1:
        raise CalibrationError(
            f"seq_len {seq_len} leaves no room after the {len(prefix)} tokens every text starts with"
        )
    end: list[int] = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    needed = num_samples * body
    ids: list[int] = []
    refused = Refused(source)
    for document in documents:
        text = refused.render(tokenizer, document)
        if text is None:
            continue
        ids += first_ids(tokenizer, text, needed - len(ids)) + end
        if len(ids) >= needed:
            break
    refused.say()
    if len(ids) < needed:
        raise CalibrationError(
            f"'{source}' gives {len(ids):,} tokens, but {num_samples} windows of {seq_len} need {needed:,}: "
            "give more text, or lower --num-samples or --seq-len"
        )
    windows = torch.tensor(ids[:needed]).view(num_samples, body)
    windows = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(num_samples, -1), windows], 1)
    # The documents behind are read for this alone: conversations that the template refuses are no loss to a run.
    behind, unread = ids[needed:], Refused(source)
    while len(behind) < held_out and (document := next(documents, None)) is not None:
        text = unread.render(tokenizer, document)
        behind += [] if text is None else first_ids(tokenizer, text, held_out - len(behind)) + end
    return CalibrationText(windows, source, torch.tensor(behind[:held_out], dtype=torch.long))


def first_ids(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """The token ids of a text if it is short, else at least the first ``count``, without reading all of it."""
    length = CHARACTERS * count + ROOM
    while True:
        ids = list(tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"])
        # The last tokens before a cut may be others than in the whole text: more than are needed must be there.
        if length >= len(text) or len(ids) >= count + ROOM:
            return ids
        length *= 4


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before every text, usually none or one BOS."""
    with_special = tokenizer("a")["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return list(with_special[:start])
    return []


def digest(windows: Tensor) -> str:
    """SHA-256 of the token ids, to name calibration data exactly."""
    return hashlib.sha256(windows.to(torch.int64).cpu().contiguous().numpy().tobytes()).hexdigest()


class Refused:
    """Counts the conversations of a source that the chat template takes and refuses."""

    def __init__(self, source: str):
        self.source = source
        self.taken = 0
        self.errors: list[CalibrationError] = []

    def render(self, tokenizer: PreTrainedTokenizerBase, document: Document) -> str | None:
        """The document as text; ``None`` where the template refuses it.

        Raises:
            CalibrationError: a conversation, and a tokenizer without a template.
        """
        return self.unless_refused(tokenizer, document, lambda: render(tokenizer, document))

    def unless_refused(
        self, tokenizer: PreTrainedTokenizerBase, document: Document, read: Callable[[], Read]
    ) -> Read | None:
        """The result of ``read`` for the document; ``None`` where the template refuses it.

        Raises:
            CalibrationError: a conversation, and a tokenizer without a template.
        """
        if not isinstance(document, list):
            return read()
        check_template(tokenizer, document)
        try:
            result = read()
        except CalibrationError as error:
            self.errors.append(error)
            return None
        self.taken += 1
        return result

    def say(self) -> None:
        """Warn of those that were left out.

        Raises:
            CalibrationError: they are more than half.
        """
        if not self.errors:
            return
        share = f"{len(self.errors):,} of {self.taken + len(self.errors):,} conversations of '{self.source}'"
        if len(self.errors) > self.taken:
            raise CalibrationError(
                f"the chat template refuses {share}; mend the rows, or give plain `text`. The first: {self.errors[0]}"
            ) from self.errors[0]
        warnings.warn(
            f"{share} are left out, the chat template refuses them; the first: {self.errors[0]}", stacklevel=3
        )


def check_template(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]]) -> None:
    """Refuse a conversation where the tokenizer cannot make text of any.

    Raises:
        CalibrationError: it has no chat template.
    """
    if not tokenizer.chat_template:
        raise CalibrationError(
            f"{_where(conversation)} has chat messages, but the tokenizer has no chat template; "
            "give plain `text` instead"
        )


def _where(conversation: list[dict[str, Any]]) -> str:
    return conversation.where if isinstance(conversation, Conversation) else "the text"


def render(tokenizer: PreTrainedTokenizerBase, document: Document, to_be_answered: bool = False) -> str:
    """A document as text: chat messages through the tokenizer's template, an instruction followed by its answer.

    Args:
        to_be_answered: end chat messages where the template lets the assistant begin.

    Raises:
        CalibrationError: messages, and a tokenizer without a template or with one that refuses them.
        UsageError: the template does not end.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Instruction):
        return document.prompt + document.response
    check_template(tokenizer, document)
    try:
        return render_chat(tokenizer, document, _where(document), to_be_answered)
    except ChatTemplateError as error:
        raise CalibrationError(str(error)) from error


def calibration_windows(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase | None, config: PruneConfig, vocab_size: int
) -> CalibrationText:
    """The calibration text of a run; of a tensor nothing is held out.

    Raises:
        CalibrationError: unreadable or too little text, or a tensor that holds no token ids.
    """
    if isinstance(calibration, Tensor):
        integral = not (calibration.is_floating_point() or calibration.is_complex())
        if calibration.ndim != 2 or not integral or calibration.numel() == 0:
            raise CalibrationError(
                f"calibration is a tensor of shape {tuple(calibration.shape)} and {calibration.dtype}; "
                "give token ids as a LongTensor (num_samples, seq_len)"
            )
        if int(calibration.min()) < 0 or int(calibration.max()) >= vocab_size:
            raise CalibrationError(f"calibration holds ids outside the vocabulary of {vocab_size} tokens")
        return CalibrationText(calibration.long(), "tensor", torch.empty(0, dtype=torch.long))
    if tokenizer is None:
        raise CalibrationError("without a tokenizer, calibration must be a LongTensor of token ids")
    source = calibration if isinstance(calibration, str) else "rows"
    rows = read_documents(calibration) if isinstance(calibration, str) else read_rows(calibration)
    held_out = evaluation_tokens(config.num_samples * config.seq_len) if config.evaluate else 0
    documents = shuffled(rows, config.seed)
    text = cut_text(tokenizer, documents, config.num_samples, config.seq_len, source, held_out)
    check_ids(text.windows, vocab_size, f"calibration on '{source}'")
    return text


def evaluation_tokens(calibration_tokens: int) -> int:
    """Number of tokens of a text that a run measures its loss on: 1/32 of the calibration's, from 1,024 to 4,096, so
    that it costs a few percent of the run; at most half of the calibration's."""
    return min(max(calibration_tokens // 32, 1024), 4096, calibration_tokens // 2)
