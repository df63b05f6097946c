"""An exported model beside the slim folder, each in its own engine, on real text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.calibration.documents import open_text
from slimgpt.errors import CalibrationError, ExportError, NumericalError, UsageError, VerificationError, one_line
from slimgpt.exporting import onnx, openvino
from slimgpt.io.result import Result
from slimgpt.models.llama_cpp import LlamaCpp, installed
from slimgpt.models.loading import load, load_config, load_tokenizer
from slimgpt.models.lookup import check_ids, text_config
from slimgpt.models.source import locate

PROMPTS = (
    "The greatest challenge that our country faces is",
    "Once upon a time there was a",
    "The capital of France is",
    "In the year 1990 the",
    "To be or not to be,",
)
NEW_TOKENS = 16
TEXT = (
    "The state of the Union is strong because the people are strong. We have built roads and schools, we have written "
    "laws and kept them, and we have argued about all of it in public. Nothing was given; everything was made by hands "
    "and by patience. What remains to be done is more than what has been done, and it will be done in the same way: "
    "one day after another, with open books and open doors, and with no fear of counting what was lost and won."
)
"""A little text of ours for where the bundled one is not at hand; its perplexity is good for comparing only."""

LONGEST_TOKEN = 64
"""Characters of a text that are read for a token that is asked for, more than any text takes on average."""

EXACT = (1e-3, 1e-2)
"""What a folder of a stock class may differ by, both sides in float32: perplexity (relative), and a logit."""
GGUF_ALLOWED = {0: 0.02, 1: 0.02, 32: 0.02, 7: 0.05}
"""Relative difference of perplexity by ``general.file_type``: F32, F16, BF16 (llama.cpp's cache is F16), Q8_0."""
FEW_BITS = frozenset({10, 11, 12, 13, 19, 20, 21, 22, 23, 24, 26, 27, 28, 29, 31, 36, 37})
"""The ``general.file_type`` of three bits and fewer."""


def perplexity_problem(perplexity: float, reference: float, allowed: float) -> str | None:
    """Why a perplexity is that of another model than the slim folder; ``None`` if it differs by no more than allowed.

    Args:
        allowed: the largest relative difference.
    """
    difference = perplexity / reference - 1
    if abs(difference) <= allowed:
        return None
    return (
        f"perplexity is {perplexity:.4f} against {reference:.4f} of the slim folder ({difference:+.2%}), and this form "
        f"allows {allowed:.2%}"
    )


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """Comparison of an exported model with the slim folder on the same token ids.

    Args:
        engine: what loaded the exported model, with its version.
        tokens: how many were compared.
        window: tokens per window, without overlap.
        perplexity: of the exported model.
        reference: of the slim folder.
        difference: ``perplexity / reference - 1``.
        largest: the largest absolute difference of a logit.
        identical: whether all logits are equal to the bit.
        continuations: how many greedy continuations agree, of how many.
        chat_template: whether it is the same text; ``None`` if neither has one.
        allowed: the largest relative difference of perplexity for this form.
        allowed_logit: the largest difference of a logit for this form; ``None`` where only perplexity counts.
    """

    engine: str
    tokens: int
    window: int
    perplexity: float
    reference: float
    difference: float
    largest: float
    identical: bool
    continuations: tuple[int, int]
    chat_template: bool | None
    allowed: float = EXACT[0]
    allowed_logit: float | None = EXACT[1]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def problem(self) -> str | None:
        """Why the exported model counts as another one; ``None`` if it is the same within what the form allows."""
        if (problem := perplexity_problem(self.perplexity, self.reference, self.allowed)) is not None:
            return problem
        if self.allowed_logit is not None and self.largest > self.allowed_logit:
            return f"a logit differs by {self.largest:.2g}, and this form allows {self.allowed_logit:.2g}"
        return None

    def check(self, path: str | Path) -> None:
        """Refuse another model.

        Raises:
            VerificationError: perplexity or a logit differs by more than the form allows.
        """
        if (problem := self.problem()) is not None:
            raise VerificationError(f"{path} is another model than the slim folder: {problem}; export it again")


@dataclass
class Engine:
    """A loaded model: logits ``(tokens, vocabulary)`` of a list of ids, and a greedy continuation."""

    name: str
    logits: Callable[[list[int]], Tensor]
    chat_template: str | None
    allowed: tuple[float, float | None] = EXACT

    def continuation(self, ids: list[int]) -> list[int]:
        """The ids that follow greedily, each from a fresh pass over all before."""
        ids = list(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-NEW_TOKENS:]


def engine_problem(path: str | Path) -> str | None:
    """Why the exported model cannot be run here; ``None`` if it can."""
    path = Path(path)
    if path.suffix == ".gguf":
        return None if installed() else "llama-cpp-python is not installed"
    if (path / openvino.MODEL_FILE).is_file():
        return None if openvino.installed() else "OpenVINO is not installed"
    if (path / onnx.MODEL_FILE).is_file():
        return None if onnx.installed() else "ONNX Runtime is not installed"
    config = path / "config.json"
    if not config.is_file():
        return "its engine is not installed"
    if '"nemotron-nas"' in config.read_text(encoding="utf-8"):
        return "nemotron-nas runs in vLLM or mlx-lm; compare it there with slimgpt verify --engine vllm --python PATH"
    return None


def verify(
    exported: str | Path,
    slim: str | Path,
    *,
    text: str | None = None,
    max_tokens: int = 1024,
    window: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Run both models on the same tokens and compare.

    Args:
        exported: a folder of a stock class, or a ``.gguf`` file.
        slim: the folder that it was made from.
        text: a text file, or ``demo``; a paragraph of ours if not given.
        max_tokens: how much of it.
        window: tokens per window, without overlap.
        progress: called after every window and continuation, with those done and in all.

    Raises:
        ExportError: the engine is not installed, or the vocabularies differ.
        UsageError: the text is too short, or fewer than two tokens are asked for.
        NumericalError: a model gives NaN or infinite logits.
    """
    check_lengths(max_tokens, window)
    problem = engine_problem(exported)
    if problem is not None:
        raise ExportError(f"{exported} cannot be verified here: {problem}")
    source = locate(str(slim))
    tokenizer = load_tokenizer(source)
    ids = tokenizer(text_of(text, max_tokens), add_special_tokens=False).input_ids[:max_tokens]
    window = min(window, len(ids) // 16 * 16 or len(ids))
    if window < 2:
        raise UsageError("the text has fewer than two tokens")
    check_ids(torch.tensor(ids), text_config(load_config(source)).vocab_size, "the text to compare on")
    reference = _transformers(str(slim))
    left = _exported(Path(exported), window)
    losses = [0.0, 0.0]
    largest, identical, count, done = 0.0, True, 0, 0
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    ends = [*range(window, len(ids), window), len(ids)]
    steps = len(ends) + len(prompts)
    for number, end in enumerate(ends, start=1):
        part = ids[end - window : end]  # the last one reaches back, so that every token counts and all are as long
        scored = min(end - done, window - 1)
        done = end
        a, b = left.logits(part), reference.logits(part)
        if a.shape != b.shape:
            raise ExportError(f"{exported} has {a.shape[-1]} words, {slim} has {b.shape[-1]}")
        for logits, whose in ((a, exported), (b, slim)):
            if not logits.isfinite().all():
                raise NumericalError(f"{whose} gives logits that are NaN or infinite; make it again from sound weights")
        target = torch.tensor(part[-scored:])
        for number, logits in enumerate((a, b)):
            losses[number] += float(F.cross_entropy(logits[-scored - 1 : -1].double(), target, reduction="sum"))
        largest = max(largest, float((a - b).abs().max()))
        identical = identical and torch.equal(a, b)
        count += scored
        if progress:
            progress(number, steps)
    agree = 0
    for number, prompt in enumerate(prompts, start=1):
        agree += left.continuation(prompt) == reference.continuation(prompt)
        if progress:
            progress(len(ends) + number, steps)
    perplexities = [math.exp(loss / count) for loss in losses]
    templates = left.chat_template, reference.chat_template
    return Verification(
        engine=left.name,
        tokens=count,
        window=window,
        perplexity=perplexities[0],
        reference=perplexities[1],
        difference=perplexities[0] / perplexities[1] - 1,
        largest=largest,
        identical=identical,
        continuations=(agree, len(prompts)),
        chat_template=None if templates == (None, None) else templates[0] == templates[1],
        allowed=left.allowed[0],
        allowed_logit=left.allowed[1],
    )


def check_lengths(max_tokens: int, window: int) -> None:
    """Refuse lengths at which nothing is predicted.

    Raises:
        UsageError: fewer than two tokens.
    """
    for name, value in (("max_tokens", max_tokens), ("window", window)):
        if value < 2:
            raise UsageError(f"{name} is {value}, and predicting needs two tokens; give 2 or more")


def text_of(text: str | None, max_tokens: int) -> str:
    """The text to compare on: ours, the demo's, or as much of a file as so many tokens may need."""
    if text is None:
        return TEXT
    if text == assets.DEMO:
        return "\n\n".join(assets.demo_documents()[1])
    try:
        with open_text(Path(text).expanduser()) as file:
            return file.read(LONGEST_TOKEN * max_tokens)
    except CalibrationError:
        raise
    except Exception as error:  # gzip and zstd have errors of their own
        raise UsageError(f"cannot read the text {text}: {one_line(error)}") from error


def _exported(path: Path, window: int) -> Engine:
    if path.suffix == ".gguf":
        return _llama_cpp(path, window)
    for file, runtime in ((openvino.MODEL_FILE, openvino.OpenVino), (onnx.MODEL_FILE, onnx.OnnxRuntime)):
        if (path / file).is_file():
            model = runtime(path)
            return Engine(model.engine, model.logits, _template(load_tokenizer(locate(str(path)))))
    return _transformers(str(path))


def _transformers(folder: str) -> Engine:
    model, tokenizer = load(folder, dtype="float32")

    @torch.no_grad()
    def logits(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids])).logits[0].float()

    return Engine(f"transformers {version('transformers')}", logits, _template(tokenizer))


def _llama_cpp(file: Path, window: int) -> Engine:
    model = LlamaCpp(file, max(window, 64 + NEW_TOKENS))
    template = model.metadata.get("tokenizer.chat_template")
    return Engine(model.engine, model.logits, template, (_allowed(model.metadata.get("general.file_type", 1)), None))


def _allowed(file_type: Any) -> float:
    """The largest relative difference of perplexity by ``general.file_type``."""
    return GGUF_ALLOWED.get(int(file_type), 1.0 if int(file_type) in FEW_BITS else 0.25)


def gguf_limit(file: Path) -> float | None:
    """The largest relative difference of perplexity for a GGUF file of rounded weights; ``None`` for one of float32."""
    field = GGUFReader(file).get_field("general.file_type")
    kind = field.contents() if field is not None else 1
    return None if kind == 0 else _allowed(kind)


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    templates = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates
