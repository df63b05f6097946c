"""Training examples from documents: token ids and labels."""

from __future__ import annotations

import hashlib
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt.calibration.documents import Document, Instruction, read_documents, shuffled
from slimgpt.calibration.windows import Refused, first_ids, prefix_ids, render
from slimgpt.errors import CalibrationError, UsageError

IGNORED = -100
"""The label of a token without loss, as in transformers."""

SHUFFLE_BUFFER = 200_000
"""Most documents of a source that are read and shuffled."""

CHUNK_CHARS = 1 << 20
"""Default number of characters of a plain text that are tokenised at once."""


@dataclass(frozen=True)
class Example:
    """One row of a batch before padding.

    Args:
        ids: token ids ``(n,)``.
        labels: the same, with :data:`IGNORED` where a token is not learned.
    """

    ids: Tensor
    labels: Tensor

    @property
    def predicted(self) -> int:
        """Tokens that the loss counts: a causal model predicts every token but the first."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Data:
    """Training and held-out examples of a run.

    Args:
        without_answer: rows that were dropped because their answer lies behind ``max_length``, or is empty.
        refused: conversations that were dropped because the chat template refuses them.
    """

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    without_answer: int = 0
    refused: int = 0

    def digest(self) -> str:
        """SHA-256 of all ids and labels, to name the data exactly."""
        total = hashlib.sha256()
        for part in (self.training, self.held_out):
            for example in part:
                total.update(example.ids.numpy().tobytes() + example.labels.numpy().tobytes())
            total.update(b"|")
        return total.hexdigest()


def collect(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    max_length: int,
    held_out: int,
    needed: int | None = None,
    *,
    pack: bool = False,
    seed: int = 0,
    shares: Sequence[float] | None = None,
) -> Data:
    """Examples from sources of text, shuffled by the seed.

    Args:
        held_out: examples to hold out, at most a tenth of all.
        needed: training examples that will be used; ``None`` takes all there are.
        shares: how many of them the sources give, in proportion; by default each the same number. A source that has
            fewer gives all it has.

    Raises:
        UsageError: shares that do not fit the sources.
        CalibrationError: unreadable text, or none that gives an example.
    """
    if shares is not None and (len(shares) != len(sources) or not all(share > 0 for share in shares)):
        raise UsageError(f"shares {tuple(shares)} must be {len(sources)} numbers above 0, one for each source of data")
    limit = None if needed is None else needed + held_out
    per_source, without_answer, refused = [], 0, 0
    for source in sources:
        documents = shuffled(read_documents(source), seed, SHUFFLE_BUFFER)
        left_out = LeftOut(source)
        per_source.append(list(islice(make_examples(tokenizer, documents, max_length, pack, left_out), limit)))
        left_out.say(max_length, bool(per_source[-1]))
        without_answer += left_out.without_answer
        refused += len(left_out.errors)
    weights = shares or [1.0] * len(sources)
    # The n-th example of a source has position n / its share; sorting interleaves the sources in proportion.
    positions = [((number + 1) / weight, place, e) for place, (weight, examples) in enumerate(zip(weights, per_source))
           for number, e in enumerate(examples)]  # fmt: skip
    interleaved = [example for *_, example in sorted(positions, key=lambda item: item[:2])]
    if held_out and len(interleaved) < 2:
        raise CalibrationError(
            f"the data gives only one example of {max_length} tokens, so none can be held out: give more text, "
            "a smaller --max-length, or --held-out 0"
        )
    num_held_out = min(held_out, max(1, len(interleaved) // 10)) if held_out else 0
    training = interleaved[num_held_out:][:needed]
    random.Random(seed).shuffle(training)
    return Data(tuple(training), tuple(interleaved[:num_held_out]), without_answer, refused)


class LeftOut(Refused):
    """Counts the rows of a source that give no example."""

    def __init__(self, source: str):
        super().__init__(source)
        self.without_answer = 0

    def say(self, max_length: int = 0, any_example: bool = True) -> None:
        """Warn of those that were left out.

        Raises:
            CalibrationError: nothing is left, or the chat template refuses more than half of the conversations.
        """
        super().say()
        rows = f"{self.without_answer:,} rows of '{self.source}' have no answer within {max_length:,} tokens"
        if any_example:
            if self.without_answer:
                warnings.warn(f"{rows} and are left out; a larger --max-length keeps them", stacklevel=3)
        elif self.without_answer:
            raise CalibrationError(
                f"{rows}, which leaves no example: raise --max-length, or give rows that are shorter"
            )
        else:
            raise CalibrationError(
                f"'{self.source}' gives no example of {max_length} tokens: give more text, or lower --max-length"
            )


def make_examples(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Document],
    max_length: int,
    pack: bool = False,
    left_out: LeftOut | None = None,
    chunk_chars: int = CHUNK_CHARS,
) -> Iterator[Example]:
    """Plain text joined and cut into windows of ``max_length`` (what is left over is not used); instructions and chats
    one by one, or in the same windows if ``pack``.

    Args:
        left_out: counts the rows that give no example.
        chunk_chars: characters of a plain text that are tokenised at once.

    Raises:
        CalibrationError: conversations, and a tokenizer without a chat template.
    """
    left_out = left_out or LeftOut("the text")
    prefix = prefix_ids(tokenizer)
    body = max_length - len(prefix)
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        if isinstance(document, str) or pack:
            for more, learned in _encode_chunks(tokenizer, document, left_out, chunk_chars):
                ids += more
                labels += learned
                while len(ids) >= body:
                    yield from _example(prefix, ids[:body], labels[:body])
                    ids, labels = ids[body:], labels[body:]
            continue
        encoded = left_out.unless_refused(tokenizer, document, partial(encode, tokenizer, document, body))
        if encoded is None:
            continue
        more, learned = encoded
        close = end if isinstance(document, Instruction) else []  # a template ends a chat itself
        examples = list(_example(prefix, (more + close)[:body], (learned + close)[:body]))
        left_out.without_answer += not examples
        yield from examples


def _encode_chunks(
    tokenizer: PreTrainedTokenizerBase, document: Document, left_out: LeftOut, chunk_chars: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of a document and of the token after it; a long text comes in pieces."""
    if not isinstance(document, str):
        encoded = left_out.unless_refused(tokenizer, document, partial(encode, tokenizer, document))
        if encoded is None:
            return
        yield encoded
    else:
        start = 0
        while start < len(document):
            # A chunk ends before white space, where tokens end too.
            cut = BLANK.search(document, start + chunk_chars, start + 2 * chunk_chars)
            stop = cut.start() if cut else start + 2 * chunk_chars
            yield encode(tokenizer, document[start:stop])
            start = stop
    if tokenizer.eos_token_id is not None:
        end = [cast(int, tokenizer.eos_token_id)]
        yield end, end


BLANK = re.compile(r"\s")


def encode(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_ids: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a document and their labels: all of a plain text, the answers of an instruction or a chat.

    Args:
        max_ids: ids that will be used; what lies far behind them is not read.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in _spans(tokenizer, document):
        if max_ids is None:
            more = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        else:
            more = first_ids(tokenizer, text, max(0, max_ids - len(ids)))
        ids += more
        labels += more if learned else [IGNORED] * len(more)
    return ids, labels


def _spans(tokenizer: PreTrainedTokenizerBase, document: Document) -> Iterator[tuple[str, bool]]:
    """The pieces of a document's text, and whether each is to be learned."""
    if isinstance(document, str):
        yield document, True
        return
    if isinstance(document, Instruction):
        yield document.prompt, False
        yield document.response, True
        return
    whole = render(tokenizer, document)
    done = 0
    for number, message in enumerate(document):
        if message.get("role") != "assistant":
            continue
        try:
            before = render(tokenizer, document[:number], to_be_answered=True)
            after = render(tokenizer, document[: number + 1])
        except CalibrationError:  # some templates take whole conversations only
            yield whole[done:], True
            return
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            # The template rewrites earlier turns, so answers cannot be told apart: learn the whole conversation.
            yield whole[done:], True
            return
        yield whole[done : len(before)], False
        yield after[len(before) :], True
        done = len(after)
    yield whole[done:], False


def _example(prefix: list[int], ids: list[int], labels: list[int]) -> Iterator[Example]:
    example = Example(torch.tensor(prefix + ids), torch.tensor([IGNORED] * len(prefix) + labels))
    if example.predicted:
        yield example


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Any]:
    """A batch ``(examples, longest)``, padded on the right."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED)
    mask = torch.zeros(len(examples), longest, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        labels[row, : len(example.ids)] = example.labels
        mask[row, : len(example.ids)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
