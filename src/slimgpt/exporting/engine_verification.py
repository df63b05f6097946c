"""An exported model in an engine that has a Python of its own, beside the slim folder in transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgpt.calibration.documents import open_text
from slimgpt.errors import CalibrationError, ExportError, NumericalError, UsageError, VerificationError, one_line
from slimgpt.exporting.engine_process import (
    GRAPHS,
    ask,
    check_installed,
    check_model,
    has_modeling_file,
    is_nemotron,
    program,
)
from slimgpt.exporting.verification import (
    EXACT,
    NEW_TOKENS,
    PROMPTS,
    check_lengths,
    gguf_limit,
    perplexity_problem,
    text_of,
)
from slimgpt.io.result import Result
from slimgpt.models.loading import load

TOLERANCE = 1e-3
"""What a log-probability may differ by, in nats, both sides in float32."""


@dataclass(frozen=True)
class PromptComparison:
    """One prompt in the engine and in transformers.

    Args:
        prompt: its text.
        largest: the largest absolute difference of a token's log-probability, in nats.
        reference: how transformers goes on greedily.
        continuation: how the engine does.
        same: whether the two are the same token ids.
        parts_at: the first new token that differs, from 0; ``None`` if none does.
        margin: by how much transformers prefers its own token there, in nats; ``None`` where nothing differs.
        tie: whether the margin is within twice the tolerance, so that rounding decides.
        same_ids: whether the engine's own tokenizer makes the same ids of the prompt; ``None`` if it has none.
    """

    prompt: str
    largest: float
    reference: str
    continuation: str
    same: bool
    parts_at: int | None
    margin: float | None
    tie: bool
    same_ids: bool | None


@dataclass(frozen=True, repr=False)
class EngineVerification(Result):
    """Comparison of an exported model in an engine with the slim folder in transformers, in float32.

    Args:
        engine: its name and version.
        versions: of the engine and of what it rests on.
        tokens: log-probabilities that were compared: of the text's tokens and of the prompts'.
        window: tokens per window of the text, without overlap.
        perplexity: of the exported model on the text.
        reference: of the slim folder.
        difference: ``perplexity / reference - 1``.
        largest: the largest absolute difference of a log-probability, in nats.
        mean: the mean absolute difference.
        tolerance: what it may be; ``None`` where the form rounds its weights and the perplexity counts.
        allowed: the largest relative difference of perplexity for this form.
        prompts: one by one.
    """

    engine: str
    versions: dict[str, str]
    tokens: int
    window: int
    perplexity: float
    reference: float
    difference: float
    largest: float
    mean: float
    tolerance: float | None
    allowed: float
    prompts: tuple[PromptComparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def continuations(self) -> tuple[int, int, int]:
        """Greedy continuations that are the same, that part at a tie, and all of them."""
        same = sum(prompt.same for prompt in self.prompts)
        return same, sum(prompt.tie for prompt in self.prompts), len(self.prompts)

    def problem(self) -> str | None:
        """Why the engine counts as computing another model; ``None`` if it computes the same within the tolerance."""
        if self.tolerance is None:
            return perplexity_problem(self.perplexity, self.reference, self.allowed)
        if self.largest > self.tolerance:
            return f"a log-probability differs by {self.largest:.2g}, and the tolerance is {self.tolerance:.2g}"
        for prompt in self.prompts:
            if prompt.same_ids is False:
                return f"its tokenizer splits the prompt {prompt.prompt!r} into other tokens"
            if not prompt.same and not prompt.tie:
                return (
                    f"the greedy continuation of {prompt.prompt!r} parts at token {prompt.parts_at}, where "
                    f"transformers prefers its own by {prompt.margin:.2g} nats"
                )
        return None

    def check(self, path: str | Path) -> None:
        """Refuse another model.

        Raises:
            VerificationError: a log-probability differs by more than the tolerance, or a continuation parts where
                there is no tie.
        """
        if (problem := self.problem()) is not None:
            raise VerificationError(f"{path} in {self.engine} is another model than the slim folder: {problem}")


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The prompts of a text file, one a line; :data:`PROMPTS` without one.

    Raises:
        UsageError: it cannot be read, or has no line.
    """
    if file is None:
        return PROMPTS
    try:
        with open_text(file.expanduser()) as lines:
            prompts = tuple(stripped for line in lines if (stripped := line.strip()))
    except CalibrationError:
        raise
    except Exception as error:  # gzip and zstd have errors of their own
        raise UsageError(f"cannot read the prompts {file}: {one_line(error)}") from error
    if not prompts:
        raise UsageError(f"{file} has no prompt; give one a line")
    return prompts


def verify_in_engine(
    exported: str | Path,
    slim: str | Path | None = None,
    *,
    engine: str,
    python: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    text: str | None = None,
    max_tokens: int = 1024,
    window: int = 256,
    tolerance: float | None = None,
    trust_remote_code: bool = False,
) -> EngineVerification:
    """Run a model in an engine, in a fresh process, and the slim folder in transformers, and compare log-probabilities
    and greedy continuations.

    Args:
        exported: what the engine loads: a folder, or a ``.gguf`` file for llama.cpp.
        slim: the folder that it was made from; the same folder if not given.
        engine: a key of :data:`slimgpt.exporting.engine_process.INSTALL`.
        python: the Python in whose environment the engine is installed, and slimgpt need not be; this one if not given.
        prompts: texts that are gone on with greedily, 16 tokens each.
        text: a text file, or ``demo``, whose log-probabilities are compared too; a paragraph of ours if not given.
        max_tokens: how much of it.
        window: tokens per window, without overlap.
        tolerance: what a log-probability may differ by, in nats; 1e-3 if not given, and for GGUF files of rounded
            weights the perplexity counts.
        trust_remote_code: let the engine run the Python code that lies in the folder.

    Raises:
        ExportError: the engine is not installed there, or cannot load the model.
        UsageError: an unknown engine, no such Python, an empty prompt, or a folder with code that is not trusted.
        NumericalError: a side gives NaN or infinite log-probabilities.
    """
    path, interpreter = Path(exported).expanduser(), program(python)
    check_model(path, engine, trust_remote_code)
    check_lengths(max_tokens, window)
    if not prompts:
        raise UsageError("there is no prompt; give one at least")
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"tolerance is {tolerance}, and a difference is at least 0; give 0.001 or so")
    if slim is None:
        if engine in ("llama.cpp", *GRAPHS) or is_nemotron(path):
            raise UsageError(f"{path} does not load in transformers; name the folder it was made from (--against)")
        slim = path
    allowed = EXACT[0]
    if tolerance is None:
        rounded = gguf_limit(path) if engine == "llama.cpp" else None
        tolerance, allowed = (TOLERANCE, allowed) if rounded is None else (None, rounded)
    check_installed(interpreter, engine)
    reference = Reference(str(slim), prompts, text, max_tokens, window)
    result = ask(
        interpreter,
        {
            "engine": engine,
            "model": str(path.absolute()),
            "model_impl": "transformers" if has_modeling_file(path) else "auto",
            "trust_remote_code": trust_remote_code,
            "texts": list(prompts),
            "sequences": reference.sequences,
        },
    )
    return reference.compare(result, tolerance, allowed)


class Reference:
    """The slim folder in transformers: what it says to prompts and to windows of a text.

    Attributes:
        sequences: the token ids, prompts first, and how many new tokens each gets.
    """

    def __init__(self, slim: str, prompts: Sequence[str], text: str | None, max_tokens: int, window: int):
        model, self.tokenizer = load(slim, dtype="float32")
        ids = self.tokenizer(text_of(text, max_tokens), add_special_tokens=False).input_ids[:max_tokens]
        self.prompts, self.window = list(prompts), min(window, len(ids))
        windows = [ids[start : start + window] for start in range(0, len(ids), window)]
        windows = [part for part in windows if len(part) > 1]
        if not windows:
            raise UsageError("the text has fewer than two tokens")
        self.sequences: list[dict[str, Any]] = [
            *({"ids": self._ids(prompt), "new_tokens": NEW_TOKENS} for prompt in prompts),
            *({"ids": part, "new_tokens": 0} for part in windows),
        ]

        @torch.no_grad()
        def logits(ids: list[int]) -> Tensor:
            return model(torch.tensor([ids])).logits[0]

        self.logprobs: list[list[float]] = []
        self.steps: list[list[Tensor]] = []
        for sequence in self.sequences:
            ids, steps = list(sequence["ids"]), []
            rows = logits(ids)
            scores = rows.double().log_softmax(-1)
            self.logprobs.append([float(scores[i, token]) for i, token in enumerate(ids[1:])])
            while len(steps) < sequence["new_tokens"]:  # each from a fresh pass over all before
                rows = rows if not steps else logits(ids)
                steps.append(rows[-1].double().log_softmax(-1))
                ids.append(int(rows[-1].argmax()))
            self.steps.append(steps)
        _check_finite(self.logprobs, slim)

    def _ids(self, prompt: str) -> list[int]:
        if not (ids := list(self.tokenizer(prompt).input_ids)):
            raise UsageError(f"the prompt {prompt!r} has no token; give text")
        return ids

    def compare(self, result: dict[str, Any], tolerance: float | None, allowed: float) -> EngineVerification:
        """The log-probabilities of an engine for the same sequences, beside these.

        Args:
            result: of `in_engine/prompt_logprobs.py`.
            tolerance: of a log-probability; ``None`` where only the perplexity counts.
            allowed: relative difference of perplexity.

        Raises:
            ExportError: it said less, or more.
            NumericalError: NaN or infinite log-probabilities.
        """
        versions = result["versions"]
        engine = " ".join(next(iter(versions.items()), ("engine", "")))
        logprobs = [sequence["logprobs"] for sequence in result["sequences"]]
        if [len(part) for part in logprobs] != [len(part) for part in self.logprobs]:
            raise ExportError(f"{engine} gave {sum(map(len, logprobs))} log-probabilities, not {self._count()}")
        _check_finite(logprobs, engine)
        gaps = [[abs(a - b) for a, b in zip(*pair)] for pair in zip(logprobs, self.logprobs)]
        limit = 2 * (tolerance if tolerance is not None else TOLERANCE)
        compared = []
        for index, prompt in enumerate(self.prompts):
            new = [int(token) for token in result["sequences"][index]["continuation"]]
            own_ids = result["text_ids"][index] if result.get("text_ids") else None
            same_ids = None if own_ids is None else own_ids == self.sequences[index]["ids"]
            compared.append(self._prompt(index, prompt, max(gaps[index], default=0.0), new, limit, same_ids))
        start, flat = len(self.prompts), [value for part in gaps for value in part]
        perplexities = [
            math.exp(-sum(sum(part) for part in side[start:]) / sum(len(part) for part in side[start:]))
            for side in (logprobs, self.logprobs)
        ]
        return EngineVerification(
            engine=engine,
            versions=versions,
            tokens=len(flat),
            window=self.window,
            perplexity=perplexities[0],
            reference=perplexities[1],
            difference=perplexities[0] / perplexities[1] - 1,
            largest=max(flat),
            mean=sum(flat) / len(flat),
            tolerance=tolerance,
            allowed=allowed,
            prompts=tuple(compared),
        )

    def _prompt(
        self, index: int, prompt: str, largest: float, new: list[int], limit: float, same_ids: bool | None
    ) -> PromptComparison:
        steps = self.steps[index]
        own = [int(row.argmax()) for row in steps]
        pairs = enumerate(zip(own, [*new, *[-1] * len(own)]))
        parts_at = next((step for step, (a, b) in pairs if a != b), None)
        margin = None
        if parts_at is not None:
            row = steps[parts_at]
            other = new[parts_at] if parts_at < len(new) else -1
            margin = float(row.max() - row[other]) if 0 <= other < len(row) else math.inf
        return PromptComparison(
            prompt=prompt,
            largest=largest,
            reference=str(self.tokenizer.decode(own)),
            continuation=str(self.tokenizer.decode([token for token in new if token >= 0])),
            same=parts_at is None and len(new) == len(own),
            parts_at=parts_at,
            margin=margin,
            tie=margin is not None and margin <= limit,
            same_ids=same_ids,
        )

    def _count(self) -> int:
        return sum(len(part) for part in self.logprobs)


def _check_finite(logprobs: list[list[float]], whose: str) -> None:
    if not all(value is not None and math.isfinite(value) for part in logprobs for value in part):
        raise NumericalError(
            f"{whose} gives log-probabilities that are NaN or infinite; make it again from sound weights"
        )
