"""Calibration text that the model writes itself: self-calibration.

The idea is that of arXiv 2410.17170 (self-calibration) and, for models with a chat template, of Magpie (arXiv
2406.08464): in front of an open user turn, a model writes the question, too. Half of its documents are such
conversations; the others, and all of a base model's, go on from the beginnings of documents of many kinds
(:mod:`slimgpt.calibration.starts`). What loops or repeats an earlier document is left out.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.calibration.batch_generation import (
    GeneratedDocument,
    TurnTokens,
    folded_on_cpu,
    generate_documents,
    parameters_moved,
)
from slimgpt.calibration.generation_limits import sequences_together
from slimgpt.calibration.repetition import MAX_SHARED, SeenText, before_the_loop
from slimgpt.calibration.starts import CHAT_TEMPERATURES, TEXT_TEMPERATURE, Starts
from slimgpt.calibration.template_tokens import special_ids, turn_tokens
from slimgpt.calibration.windows import digest, prefix_ids
from slimgpt.errors import CalibrationError
from slimgpt.models.lookup import context_length, text_config
from slimgpt.runtime.devices import DTYPES, dtype_name
from slimgpt.runtime.distributed import ALONE, Ranks
from slimgpt.runtime.thresholds import thresholds

MAX_TOKENS = 384
"""Tokens of a document at most."""

LEAST_TOKENS = 32
"""Tokens that are left of a document at least, or it is left out."""

MAX_TRIALS = 4
"""So many times as many documents as expected are written at most, before the model is refused."""

OnWritten = Callable[[int, int, float], None]
"""Called after every step of writing with its number, the number of all and the seconds it took."""


Placed = Callable[[PreTrainedModel, torch.device, torch.dtype], AbstractContextManager[None]]
"""Context manager in which a model runs on a device, in a type."""


class Rounds(Protocol):
    """Storage of finished rounds, so that a killed run goes on."""

    def read(self, number: int) -> dict[str, Any] | None:
        """A round that is kept, as plain values."""
        ...

    def write(self, number: int, values: dict[str, Any]) -> None:
        """Keep a round."""
        ...


class NoRounds:
    """Keeps nothing."""

    def read(self, number: int) -> dict[str, Any] | None:  # noqa: ARG002
        return None

    def write(self, number: int, values: dict[str, Any]) -> None:
        """Forget it."""


@dataclass(frozen=True)
class SelfCalibration:
    """Calibration windows that a model wrote.

    Args:
        windows: token ids ``(num_samples, seq_len)``.
        held_out: token ids of further documents, ``(tokens,)``.
        info: what a report says of them: documents by kind, tokens, what was left out, temperatures, dtype, seconds.
    """

    windows: Tensor
    held_out: Tensor
    info: dict[str, Any]


@dataclass
class Writer:
    """Writes calibration text with a model.

    Args:
        model: whole, in eval mode, on the device that is to run it.
        length: tokens of a document at most.
        seed: of the openings and of what is drawn.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    length: int
    seed: int
    prefix: list[int] = field(init=False)
    turns: TurnTokens | None = field(init=False)
    special: frozenset[int] = field(init=False)
    starts: Starts = field(init=False)

    def __post_init__(self) -> None:
        self.prefix, self.turns = prefix_ids(self.tokenizer), turn_tokens(self.tokenizer)
        if self.turns and len(self.turns.before) + len(self.turns.between) + LEAST_TOKENS > self.length:
            self.turns = None  # no room for a conversation
        self.special = special_ids(self.tokenizer, self.model)
        longest = max(min(self.length // 2, self.length - LEAST_TOKENS), 1)
        vocabulary = text_config(self.model.config).vocab_size
        self.starts = Starts(self.tokenizer, self.prefix, self.turns, longest, self.seed, vocabulary)

    def round(
        self, number: int, count: int, together: int, on_written: Callable[[int, int, float], None] | None, ranks: Ranks
    ) -> list[GeneratedDocument]:
        """The documents of a round, as they were written, in all processes.

        Args:
            together: so many at once; what is written does not depend on it but for rounding.
            ranks: divide the documents.
        """
        starts = self.starts(number * thresholds().generation_round, count)
        own = ranks.rows(count)
        mixed = int.from_bytes(hashlib.sha256(f"{self.seed} {number}".encode()).digest()[:7], "big")
        uniforms = torch.rand(count, self.length, generator=torch.Generator().manual_seed(mixed))
        written: list[GeneratedDocument] = []
        with folded_on_cpu(self.model):
            for first in range(own.start, own.stop, together):
                rows = slice(first, min(first + together, own.stop))
                written += generate_documents(
                    self.model,
                    starts[rows],
                    uniforms[rows],
                    special=self.special,
                    turns=self.turns,
                    on_generated=on_written,
                )
        if ranks.world == 1:
            return written
        values = json.dumps([[document.ids, document.own, document.ended] for document in written])
        documents = [each for text in ranks.texts(values) for each in json.loads(text)]
        return [
            GeneratedDocument(start, ids, own=sampled, ended=ended)
            for start, (ids, sampled, ended) in zip(starts, documents, strict=True)
        ]

    def finished(self, document: GeneratedDocument, kept: int) -> list[int]:
        """The tokens of a document as they stand in a window.

        Args:
            kept: so many of its tokens stay; the rest loops.
        """
        end: list[int] = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]  # type: ignore[list-item]
        if document.start.kind == "text":
            begin = len(self.starts.begin)
            return document.ids[begin:kept] + end
        closed = list(self.turns.behind) if self.turns and document.ended and kept == len(document.ids) else []
        return document.ids[:kept] + closed + ([] if set(end) & set(closed) else end)


def kept_documents(
    writer: Writer, documents: Sequence[GeneratedDocument], seen: SeenText
) -> tuple[list[list[int]], Counter]:
    """The documents that are good to calibrate on, cut where they begin to loop, and how many of them were what.

    Args:
        seen: text that was taken before; what is taken now is added.
    """
    kept, counts = [], Counter({"chat": 0, "text": 0, "short": 0, "repeated": 0, "cut": 0})
    for document in documents:
        start = len(document.start.tokens)
        own = document.ids[start:]
        length = before_the_loop(own)
        if length < LEAST_TOKENS:
            counts["short"] += 1
        elif seen.shared_share(own[:length]) > MAX_SHARED:
            counts["repeated"] += 1
        else:
            counts["cut"] += length < len(own)
            counts[document.start.kind] += 1
            kept.append(writer.finished(document, start + length))
            seen.add(kept[-1])
    return kept, counts


def pack(documents: Sequence[Sequence[int]], prefix: Sequence[int], num_samples: int, seq_len: int) -> Tensor:
    """Windows ``(num_samples, seq_len)`` from documents in a row, each window with the prefix before it.

    Raises:
        CalibrationError: too few tokens.
    """
    body = seq_len - len(prefix)
    ids = [token for document in documents for token in document][: num_samples * body]
    if body < 1 or len(ids) < num_samples * body:
        raise CalibrationError(
            f"{len(ids):,} tokens do not fill {num_samples} windows of {seq_len}; lower --num-samples or --seq-len"
        )
    start = torch.tensor(list(prefix), dtype=torch.long).expand(num_samples, -1)
    return torch.cat([start, torch.tensor(ids).view(num_samples, body)], 1)


def write_calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    seed: int,
    *,
    held_out: int = 0,
    device: torch.device,
    dtype: torch.dtype,
    budget: int | None = None,
    rounds: Rounds | None = None,
    on_written: OnWritten | None = None,
    ranks: Ranks = ALONE,
    placed: Placed = parameters_moved,
) -> SelfCalibration:
    """Calibration windows of text that the model writes; the model is as it was afterwards.

    Args:
        held_out: tokens that are written beside those of the windows, to evaluate on.
        device: where the model is run.
        dtype: of its parameters meanwhile.
        budget: bytes that may be used on the device; ``None``: what is free.
        rounds: where finished rounds are kept; rounds that are there are not written again. Only the first process's
            are read and written.
        ranks: the processes that divide the documents of every round; the text is the same in all of them.
        placed: brings the model to the device; by default whole.

    Raises:
        CalibrationError: what it writes is too short or repeats itself.
        NumericalError: predictions that are NaN or infinite.
    """
    rounds = rounds if rounds is not None and ranks.main else NoRounds()
    first = rounds.read(0)  # a resumed run goes on in the type it began with
    dtype = DTYPES[ranks.values(first["dtype"] if first else dtype_name(dtype))]
    writer = Writer(model, tokenizer, min(MAX_TOKENS, seq_len, context_length(model.config) or MAX_TOKENS), seed)
    in_windows = num_samples * (seq_len - len(writer.prefix))
    needed = in_windows + held_out
    expected = 0.6 * writer.length  # tokens of a document that are kept, on average
    most = int(MAX_TRIALS * needed / expected) + 8
    documents: list[list[int]] = []
    counts: Counter = Counter()
    tokens = written = number = 0
    seconds = 0.0
    seen, size = SeenText(), thresholds().generation_round
    while tokens < needed:
        if written >= most:
            raise CalibrationError(
                f"of {written:,} documents that the model wrote, {len(documents):,} with {tokens:,} tokens are fit for "
                f"calibration ({counts['short']:,} short or looping, {counts['repeated']:,} repeat others), and "
                f"{needed:,} tokens are needed: give text with --calibration FILE, or --calibration demo"
            )
        values = ranks.values(rounds.read(number))
        if values is None:
            begin = time.perf_counter()
            mean = tokens / written if tokens else expected
            count = min(size, max(int((needed - tokens) / mean * 1.05) + 1, 8))
            rounds_left = max(-(-(needed - tokens) // int(mean * size)), 1)
            progress = partial(_report, on_written, number, rounds_left) if on_written and ranks.main else None
            together = min(sequences_together(model, writer.length, dtype, device, budget), size)
            with placed(model, device, dtype):
                texts = writer.round(number, count, together, progress, ranks)
            kept, kinds = kept_documents(writer, texts, seen)
            values = {
                "documents": kept,
                "counts": dict(kinds),
                "written": count,
                "sampled": sum(text.own for text in texts),
                "dtype": dtype_name(dtype),
                "seconds": time.perf_counter() - begin,
            }
            rounds.write(number, values)
        else:
            for document in values["documents"]:
                seen.add(document)
        documents += values["documents"]
        counts.update(values["counts"])
        counts["sampled"] += values["sampled"]
        written += values["written"]
        seconds += values["seconds"]
        tokens = sum(map(len, documents))
        number += 1
    windows = pack(documents, writer.prefix, num_samples, seq_len)
    info = {
        "num_samples": num_samples,
        "sha256": digest(windows),
        "documents": {name: counts[name] for name in ("chat", "text")},
        "left_out": {name: counts[name] for name in ("short", "repeated")},
        "cut_at_loop": counts["cut"],
        "sampled_tokens": counts["sampled"],
        "temperatures": list(CHAT_TEMPERATURES),
        "text_temperature": TEXT_TEMPERATURE,
        "dtype": dtype_name(dtype),
        "seconds": seconds,
    }
    behind = [token for document in documents for token in document][in_windows:needed]
    return SelfCalibration(windows, torch.tensor(behind, dtype=torch.long), info)


def _report(on_written: OnWritten, number: int, rounds_left: int, step: int, steps: int, seconds: float) -> None:
    """Tell a round's step among those of all rounds, as far as they can be foreseen."""
    on_written(number * steps + step, (number + rounds_left) * steps, seconds)
