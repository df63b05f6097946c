"""The texts of the comparison, from a folder that the user has: what is calibrated on and what is measured on.

C4 and WikiText-2 are divided once and for all, whatever the calibration's seed and size, so that no text is used
twice: C4 documents into calibration, validation and test; the raw train text of WikiText-2 into calibration and
validation. WikiText-2's test text and C4's test documents are read for the final table only.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.assets import demo_documents
from slimgpt.calibration import Document, cut_windows, read_documents, shuffled
from slimgpt.calibration.self_calibration import write_calibration
from slimgpt.errors import CalibrationError
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.recovery.dataset import Example, encode

FILES = {
    "c4": "c4/c4_train_shard0_first1000.jsonl",
    "alpaca": "alpaca/alpaca_data_cleaned.json",
    "wikitext2-train": "wikitext2/wiki.train.raw.first1MB.txt",
    "wikitext2-test": "wikitext2/wiki.test.raw",
}
SOURCES = ("c4", "alpaca", "wikitext2", "speeches", "auto", "mix")
"""What can be calibrated on; ``auto`` is text that the dense model writes, ``mix`` that and a third of speeches."""

CHAT = "chat"
"""Not a text but answers in the model's chat template: those of the last rows of Alpaca."""

CHAT_ANSWERS, CHAT_TOKENS = 160, 512
"""Answers that are measured on, and tokens of a conversation at most; longer ones are left out."""

C4_CALIBRATION, C4_VALIDATION = 700, 100
"""Shares of the 1,000 documents; what is left is the test share."""

WIKITEXT_CALIBRATION = 2 / 3
"""The share of the train text that may be calibrated on; what is left is validation text."""


@dataclass(frozen=True)
class Texts:
    """The folder of texts; see :data:`FILES` for what it holds."""

    folder: Path

    def file(self, name: str) -> Path:
        """The file of a text.

        Raises:
            CalibrationError: it is not there.
        """
        path = self.folder / FILES[name]
        if not path.is_file():
            raise CalibrationError(
                f"no such text: {path}; give the folder that holds {FILES[name]} as --data, or leave out what needs it"
            )
        return path

    def documents(self, source: str) -> list[Document]:
        """What may be calibrated on, in the order of the file.

        Raises:
            CalibrationError: an unknown source, or no such file.
        """
        if source == "c4":
            return self._c4()[:C4_CALIBRATION]
        if source == "wikitext2":
            text = self._wikitext_train()
            return _articles(text[: _line_end(text, WIKITEXT_CALIBRATION)])
        if source == "speeches":
            return list(demo_documents()[0])
        if source == "alpaca":
            rows = json.loads(self.file("alpaca").read_text(encoding="utf-8"))
            return ["\n\n".join(part for part in (r["instruction"], r["input"], r["output"]) if part) for r in rows]
        raise CalibrationError(f"calibration source '{source}' is no text; choose {', '.join(SOURCES)}")

    def held_out(self, name: str, validation: bool) -> str:
        """The text that perplexity is measured on: ``wikitext2``, ``c4`` or ``speeches``.

        Args:
            validation: the text for choosing settings, rather than the one of the final table.
        """
        if name == "c4":
            first = C4_CALIBRATION + (0 if validation else C4_VALIDATION)
            chosen = self._c4()[first : C4_CALIBRATION + C4_VALIDATION if validation else None]
            return "\n\n".join(str(document) for document in chosen)
        if name == "speeches":
            return "\n\n".join(demo_documents()[1])
        if not validation:
            return _read(self.file("wikitext2-test"))
        text = self._wikitext_train()
        return text[_line_end(text, WIKITEXT_CALIBRATION) :]

    def answers(self, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
        """Answers of Alpaca in the model's chat template, with the tokens to be predicted; see :data:`CHAT_ANSWERS`.

        Raises:
            CalibrationError: no such file, or a template that refuses them.
        """
        examples: list[Example] = []
        for row in reversed(json.loads(self.file("alpaca").read_text(encoding="utf-8"))):
            question = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            example = Example(*map(torch.tensor, encode(tokenizer, turns)))
            if example.predicted and len(example.ids) <= CHAT_TOKENS:
                examples.append(example)
            if len(examples) == CHAT_ANSWERS:
                break
        return examples

    def windows(
        self, tokenizer: PreTrainedTokenizerBase, source: str, num_samples: int, seq_len: int, seed: int
    ) -> Tensor:
        """Calibration windows ``(num_samples, seq_len)`` of a source that is text.

        Raises:
            CalibrationError: no such file, or too little text in it.
        """
        documents = shuffled(iter(self.documents(source)), seed)
        return cut_windows(tokenizer, documents, num_samples, seq_len, source)

    def _c4(self) -> list[Document]:
        return _divided(self.file("c4"))

    def _wikitext_train(self) -> str:
        return _read(self.file("wikitext2-train"))


@cache
def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _divided(path: Path) -> list[Document]:
    """Documents in an order that is the same whatever the calibration's seed."""
    documents = list(read_documents(str(path)))
    random.Random(0).shuffle(documents)
    return documents


def _line_end(text: str, share: float) -> int:
    return text.find("\n", int(len(text) * share)) + 1


def _articles(text: str) -> list[Document]:
    """WikiText's articles; each begins with a line `` = Title = ``."""
    articles: list[Document] = []
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.startswith(" = ") and not line.startswith(" = =") and lines:
            articles.append("".join(lines))
            lines = []
        lines.append(line)
    return [*articles, "".join(lines)]


@cache
def sha256(text: str) -> str:
    """Names a text exactly."""
    return hashlib.sha256(text.encode()).hexdigest()


def self_written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, device: torch.device, **sizes: int
) -> Tensor:
    """Windows that the model writes itself, as ``--calibration auto`` has them; kept in a file: they take minutes.

    Args:
        sizes: ``num_samples``, ``seq_len`` and ``seed``.
    """
    if not file.is_file():
        written = in_eval_mode(write_calibration)(model, tokenizer, **sizes, device=device, dtype=torch.float32)
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        save_file({"windows": written.windows.contiguous()}, unfinished)
        unfinished.rename(file)
    return load_file(file)["windows"]
