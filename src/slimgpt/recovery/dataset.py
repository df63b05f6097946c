"""Documents to training examples: token ids, and which of them are to be learned."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt.calibration.documents import Document, Instruction, read_documents, shuffled
from slimgpt.calibration.windows import prefix_ids, render
from slimgpt.errors import CalibrationError, UsageError

IGNORED = -100
"""The label of a token that is not learned, as everywhere in transformers."""

SHUFFLE_BUFFER = 200_000
"""Documents of a source that are read and shuffled at most."""


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
    """What a run trains on and what it holds out."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]

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
    per_source = []
    for source in sources:
        documents = shuffled(read_documents(source), seed, SHUFFLE_BUFFER)
        per_source.append(list(islice(make_examples(tokenizer, documents, max_length, pack), limit)))
    for source, found in zip(sources, per_source):
        if not found:
            raise CalibrationError(f"'{source}' gives no example of {max_length} tokens: give more text")
    weights = shares or [1.0] * len(sources)
    # The n-th example of a source is due at n / its share; sorting merges the sources in proportion.
    due = [((number + 1) / weight, place, e) for place, (weight, found) in enumerate(zip(weights, per_source))
           for number, e in enumerate(found)]  # fmt: skip
    in_turn = [example for *_, example in sorted(due, key=lambda item: item[:2])]
    if held_out and len(in_turn) < 2:
        raise CalibrationError(
            f"the data gives only one example of {max_length} tokens, so none can be held out: give more text, "
            "or --held-out 0"
        )
    aside = min(held_out, max(1, len(in_turn) // 10)) if held_out else 0
    training = in_turn[aside:][:needed]
    random.Random(seed).shuffle(training)
    return Data(tuple(training), tuple(in_turn[:aside]))


def make_examples(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], max_length: int, pack: bool = False
) -> Iterator[Example]:
    """Plain text joined and cut into windows of ``max_length`` (what is left over is not used); instructions and chats
    one by one, or in the same windows if ``pack``."""
    prefix = prefix_ids(tokenizer)
    body = max_length - len(prefix)
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    ids: list[int] = []
    labels: list[int] = []
    for document in documents:
        more, learned = encode(tokenizer, document)
        if isinstance(document, str) or pack:
            ids += more + end
            labels += learned + end
            while len(ids) >= body:
                yield from _example(prefix, ids[:body], labels[:body])
                ids, labels = ids[body:], labels[body:]
        else:
            close = end if isinstance(document, Instruction) else []  # a template ends a chat itself
            yield from _example(prefix, (more + close)[:body], (learned + close)[:body])


def encode(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[list[int], list[int]]:
    """Token ids of a document and their labels: all of a plain text, the answers of an instruction or a chat."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in _spans(tokenizer, document):
        more = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
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
        before = render(tokenizer, document[:number], to_be_answered=True)
        after = render(tokenizer, document[: number + 1])
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
