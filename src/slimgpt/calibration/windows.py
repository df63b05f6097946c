"""Equal-length windows of token ids, unpadded and seeded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt.calibration.documents import Document, Instruction, read_documents, shuffled
from slimgpt.config import PruneConfig
from slimgpt.errors import CalibrationError


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
    """Windows from documents in the order given; see :func:`sample_windows`."""
    prefix = prefix_ids(tokenizer)
    body = seq_len - len(prefix)
    if body < 1:
        raise CalibrationError(
            f"seq_len {seq_len} leaves no room after the {len(prefix)} tokens every text starts with"
        )
    end: list[int] = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    needed = num_samples * body
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(render(tokenizer, document), add_special_tokens=False, verbose=False)["input_ids"]
        ids += end
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise CalibrationError(
            f"'{source}' gives {len(ids):,} tokens, but {num_samples} windows of {seq_len} need {needed:,}: "
            "give more text, or lower --num-samples or --seq-len"
        )
    windows = torch.tensor(ids[:needed]).view(num_samples, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(num_samples, -1), windows], 1)


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


def render(tokenizer: PreTrainedTokenizerBase, document: Document, to_be_answered: bool = False) -> str:
    """A document as text: chat messages through the tokenizer's template, an instruction followed by its answer.

    Args:
        to_be_answered: end chat messages where the template lets the assistant begin.

    Raises:
        CalibrationError: messages, and a tokenizer without a template or with one that refuses them.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Instruction):
        return document.prompt + document.response
    if not tokenizer.chat_template:
        raise CalibrationError(
            "the text has chat `messages`, but the tokenizer has no chat template; give plain `text` instead"
        )
    try:
        return str(tokenizer.apply_chat_template(document, tokenize=False, add_generation_prompt=to_be_answered))
    except Exception as error:
        raise CalibrationError(f"the tokenizer's chat template refuses a conversation: {error}") from error


def calibration_windows(
    calibration: str | Tensor, tokenizer: PreTrainedTokenizerBase | None, config: PruneConfig, vocab_size: int
) -> tuple[Tensor, str]:
    """Token ids ``(num_samples, seq_len)`` and the name of where they come from.

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
        return calibration.long(), "tensor"
    if tokenizer is None:
        raise CalibrationError("without a tokenizer, calibration must be a LongTensor of token ids")
    return sample_windows(tokenizer, calibration, config.num_samples, config.seq_len, config.seed), calibration
