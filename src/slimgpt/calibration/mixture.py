"""Calibration text of several sources with shares, and of what the model writes itself."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.calibration.documents import AUTO
from slimgpt.calibration.self_calibration import SelfCalibration
from slimgpt.calibration.windows import Calibration, CalibrationText, calibration_windows, evaluation_tokens
from slimgpt.config import PruneConfig
from slimgpt.errors import CalibrationError

MIX = "mix"
"""The name that stands for :func:`mix_sources`."""

HUB_SETS = ("allenai/c4:en", "flytech/python-codes-25k", "open-web-math/open-web-math", "HuggingFaceTB/smoltalk:all")
"""Web text, code, mathematics and chat on the hub, with a network a part of ``mix``."""

HUB = ("huggingface.co", 443)
SHARE = re.compile(r"(.+):(\d+(?:\.\d+)?)")


Write = Callable[[int, int], SelfCalibration]
"""Writes so many windows of calibration text, and so many tokens behind them that are held out."""


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and its share of the windows."""

    source: str
    share: Fraction


def parse_mixture(text: str) -> list[Part]:
    """The sources of ``--calibration`` and their shares, such as ``auto:2,text.jsonl:1``; 1 if none is given.

    What is a file or folder by its whole name, and what has neither a comma nor a named share of ``auto`` or ``demo``,
    is one source as it stands.

    Raises:
        CalibrationError: an empty source, a source that is there twice, or a share of 0.
    """
    if os.path.lexists(Path(text).expanduser()):
        return [Part(text, Fraction(1))]
    words = [word.strip() for word in text.split(",")]
    match = SHARE.fullmatch(text)
    if len(words) == 1 and not (match and match[1] in (AUTO, assets.DEMO)):
        return [Part(text, Fraction(1))]
    parts = []
    for word in words:
        match = SHARE.fullmatch(word)
        source, share = (match[1], Fraction(match[2])) if match else (word, Fraction(1))
        if not source or share <= 0:
            raise CalibrationError(
                f"calibration '{text}': '{word}' must be a source with a share above 0, such as auto:2,text.jsonl:1"
            )
        if source == MIX:
            raise CalibrationError(
                f"calibration '{text}': '{MIX}' stands alone; name its sources, such as {AUTO}:2,{assets.DEMO}:1"
            )
        parts.append(Part(source, share))
    sources = [part.source for part in parts]
    if twice := next((source for source in sources if sources.count(source) > 1), None):
        raise CalibrationError(f"calibration '{text}' names '{twice}' twice; give it once, with the sum of its shares")
    return parts


def mix_sources() -> str:
    """The mixture that ``mix`` stands for here: half of it self-written, the rest the bundled text and, with the hub in
    reach, sets of web text, code, mathematics and chat."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") or not _in_reach():
        return f"{AUTO}:2,{assets.DEMO}:1"
    others = (assets.DEMO, *HUB_SETS)
    return ",".join((f"{AUTO}:{len(others)}", *(f"{name}:1" for name in others)))


def _in_reach() -> bool:
    try:
        socket.create_connection(HUB, timeout=3).close()
    except OSError:
        return False
    return True


def windows_by_part(parts: Sequence[Part], num_samples: int) -> list[int]:
    """Windows of every part, by the largest remainder, at least one of each.

    Raises:
        CalibrationError: fewer windows than parts.
    """
    if num_samples < len(parts):
        raise CalibrationError(f"num_samples {num_samples} is below the {len(parts)} sources of calibration; raise it")
    total = sum(part.share for part in parts)
    exact = [part.share / total * num_samples for part in parts]
    counts = [max(math.floor(share), 1) for share in exact]
    while (difference := num_samples - sum(counts)) != 0:
        step = 1 if difference > 0 else -1
        places = [place for place in range(len(parts)) if step > 0 or counts[place] > 1]
        counts[max(places, key=lambda place: step * (exact[place] - counts[place]))] += step
    return counts


def interleave(parts: Sequence[Tensor], seed: int) -> Tensor:
    """The windows of all parts in an order given by the seed; those of a single part stay in theirs."""
    windows = torch.cat(list(parts))
    if len(parts) == 1:
        return windows
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


@dataclass(frozen=True)
class CalibrationMixture:
    """Calibration text of one or several sources, of which the model may still have to write a part.

    Args:
        source: the name of where it comes from, with the sources of a mixture.
        parts: the text of every source in turn; ``None`` for the one that the model writes.
        self_written: windows that the model writes; 0: none.
        shape: ``(num_samples, seq_len)`` of all.
        held_out: tokens of all sources together that are held out at most.
        seed: of the order of windows from several sources.
    """

    source: str
    parts: tuple[CalibrationText | None, ...]
    self_written: int
    shape: tuple[int, int]
    held_out: int
    seed: int

    @property
    def windows(self) -> Tensor:
        """All windows, or a tensor of their shape without storage where the model has yet to write some."""
        if self.self_written:
            return torch.empty(self.shape, dtype=torch.long, device="meta")
        return interleave([part.windows for part in self.parts if part is not None], self.seed)

    def complete(self, write: Write | None = None) -> tuple[CalibrationText, dict[str, Any]]:
        """The whole text, and what a report says of the part that the model wrote.

        Args:
            write: writes so many windows and so many tokens that are held out.
        """
        info: dict[str, Any] = {}
        texts = [part for part in self.parts if part is not None]
        if self.self_written:
            assert write is not None
            written = write(self.self_written, self.held_out * self.self_written // self.shape[0])
            own = CalibrationText(written.windows, AUTO, written.held_out)
            texts = [own if part is None else part for part in self.parts]
            info = {"self_written": written.info}
        if len(texts) == 1:
            return texts[0]._replace(source=self.source), info
        behind = [text.held_out[: self.held_out * len(text.windows) // self.shape[0]] for text in texts]
        windows = interleave([text.windows for text in texts], self.seed)
        return CalibrationText(windows, self.source, torch.cat(behind)), info


def read_calibration(
    calibration: Calibration, tokenizer: PreTrainedTokenizerBase | None, config: PruneConfig, vocab_size: int
) -> CalibrationMixture:
    """The calibration text that was asked for, as far as it is there before a weight is loaded.

    Raises:
        CalibrationError: unreadable or too little text, a mixture that cannot be, or a tensor that holds no token ids.
    """
    held_out = evaluation_tokens(config.num_samples * config.seq_len) if config.evaluate else 0
    if not isinstance(calibration, str) or tokenizer is None:
        if isinstance(calibration, str) and calibration == AUTO:
            raise CalibrationError(
                "without a tokenizer the model cannot write its calibration text (calibration 'auto'): give the "
                "tokenizer, or calibration as a LongTensor of token ids"
            )
        text = calibration_windows(calibration, tokenizer, config, vocab_size)
        shape = (len(text.windows), text.windows.shape[1])
        return CalibrationMixture(text.source, (text,), 0, shape, held_out, config.seed)
    name = mix_sources() if calibration == MIX and not os.path.lexists(MIX) else calibration
    parts = parse_mixture(name)
    counts = windows_by_part(parts, config.num_samples)
    texts = [
        None
        if part.source == AUTO
        else calibration_windows(part.source, tokenizer, replace(config, num_samples=count), vocab_size)
        for part, count in zip(parts, counts)
    ]
    written = sum(count for part, count in zip(parts, counts) if part.source == AUTO)
    shape = (config.num_samples, config.seq_len)
    return CalibrationMixture(name, tuple(texts), written, shape, held_out, config.seed)
