"""Windows that a run measures its loss on: held-out text of the calibration, and the bundled one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.calibration.windows import CalibrationText, evaluation_tokens, prefix_ids

MAX_WINDOW = 256
"""Longer windows are cut: more of them come from more places."""

BUNDLED, HELD_OUT = "bundled", "held_out"
""":func:`slimgpt.assets.general_text`, and text of the calibration that is not calibrated on."""

FOR_PEOPLE = {BUNDLED: "other text (bundled)", HELD_OUT: "calibration text, held out"}
"""What the texts are called on cards and terminals; the first tells more, for nothing was fitted to it."""


@dataclass(frozen=True)
class EvaluationText:
    """Windows of one text.

    Args:
        source: the name of where it comes from.
        windows: token ids, ``(count, window)``; all texts of a run have the same window.
        tokens_per_byte: of UTF-8.
    """

    source: str
    windows: Tensor
    tokens_per_byte: float


def evaluation_texts(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> dict[str, EvaluationText]:
    """The texts that a run measures its loss on, by :data:`BUNDLED` and :data:`HELD_OUT`.

    One that is too short for a window is left out, and without a tokenizer there is none.

    Args:
        vocab_size: rows of the embedding; windows with other ids are left out.
    """
    window = min(text.windows.shape[1], MAX_WINDOW)
    if tokenizer is None:
        return {}
    prefix = prefix_ids(tokenizer)
    body = window - len(prefix)
    if window < 2 or body < 1:
        return {}
    bundled = torch.tensor(
        tokenizer(assets.general_text(), add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )
    most = max(evaluation_tokens(text.windows.numel()) // window, 1)
    texts = {}
    for name, source, ids in ((BUNDLED, "bundled", bundled), (HELD_OUT, text.source, text.held_out)):
        count = min(most, len(ids) // body)
        # Spread over the whole text, whose pieces are of many kinds.
        starts = torch.linspace(0, len(ids) - body, count).long().tolist() if count else []
        pieces = [ids[start : start + body] for start in starts]
        pieces = [piece for piece in pieces if int(piece.max()) < vocab_size]
        if pieces:
            bodies = torch.stack(pieces)
            windows = torch.cat([torch.tensor(prefix, dtype=torch.long).expand(len(bodies), -1), bodies], 1)
            texts[name] = EvaluationText(source, windows, bodies.numel() / max(_bytes(tokenizer, bodies), 1))
    return texts


def _bytes(tokenizer: PreTrainedTokenizerBase, windows: Tensor) -> int:
    """The UTF-8 size of some windows."""
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in windows.tolist())
    return sum(len(str(text).encode(errors="replace")) for text in texts)
