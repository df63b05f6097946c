"""Settings of a comparison, and the measurements of one of its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from slimgpt.comparison.spread import mean_of_equal
from slimgpt.evaluation.passkey_retrieval import Passkey
from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.samples import Sample
from slimgpt.evaluation.tasks import TaskScores


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison.

    Args:
        texts: as :func:`slimgpt.evaluation.read_text` takes them.
        windows: window lengths in tokens, for every text.
        max_tokens: tokens read of every text; all if ``None``.
        tasks: of lm-evaluation-harness; none if empty.
        limit: rows of every task.
        chat_template: put the questions of tasks through the chat template.
        confirm_run_unsafe_code: let tasks run the code that the models write.
        long_window: also perplexity by position up to here, on the first text; left out if ``None``.
        passkey: lengths of texts that hide a number.
        samples: how many texts every model writes; see :func:`slimgpt.evaluation.write_samples`.
        seeds: how often texts, tasks and pass keys are measured: with more than one, each time with other rows of a
            task where ``limit`` leaves some, other examples before a question, other sampled tokens, other pass keys,
            and windows that begin elsewhere.
        batches, prompt, new_tokens, rounds: of the timing; no timing if there are no batches.
    """

    texts: tuple[str, ...] = ("demo",)
    windows: tuple[int, ...] = (128,)
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    long_window: int | None = None
    passkey: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    prompt: int = 512
    new_tokens: int = 128
    rounds: int = 5
    samples: int = 3
    seeds: int = 1


@dataclass
class ModelResult:
    """Measurements of one model with one seed, without its speed; beside it those with other seeds and of other models
    of the same column.

    Args:
        name: label in the table.
        removed: pruning ratio that was reached; ``None`` for a model that is not slim.
        perplexities: pairs of text name and perplexity; a slim model's with its divergence from the base, unless their
            tokenizers differ.
        leaks: contamination note by text name.
        samples: what it writes.
        commands: those that made it, from its report; none for a model without.
        method: how it was pruned; empty for a model without a report, as the next two.
        calibration: the text that it was calibrated on.
        kept: share of every layer's parameters that stayed.
        folder: what tells the model from others of the same column.
        seed: what everything was drawn with; ``None``: the first rows and tokens, nothing drawn.
        repeats: the same of other seeds and models, without samples.
    """

    name: str
    parameters: int
    removed: float | None
    perplexities: list[tuple[str, Perplexity]] = field(default_factory=list)
    leaks: dict[str, str] = field(default_factory=dict)
    tasks: TaskScores | None = None
    by_position: Perplexity | None = None
    passkey: Passkey | None = None
    samples: list[Sample] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    method: str = ""
    calibration: str = ""
    kept: list[float] = field(default_factory=list)
    folder: str = ""
    seed: int | None = None
    repeats: list[ModelResult] = field(default_factory=list)

    @property
    def runs(self) -> tuple[ModelResult, ...]:
        """All measurements of the column, this one first."""
        return (self, *self.repeats)

    def mean(self, figure: Callable[[ModelResult], float]) -> float:
        """The mean of a figure over all runs."""
        return mean_of_equal([figure(run) for run in self.runs])

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {
            **{name: getattr(self, name) for name in ("name", "parameters", "removed", "leaks")},
            "perplexities": [{"text": text, **value.to_json()} for text, value in self.perplexities],
            "tasks": self.tasks and self.tasks.to_json(),
            "by_position": self.by_position and self.by_position.to_json(),
            "passkey": self.passkey and self.passkey.to_json(),
            "samples": [sample.to_json() for sample in self.samples],
            "commands": self.commands,
            "method": self.method,
            "calibration": self.calibration,
            "kept": self.kept,
            "folder": self.folder,
            "seed": self.seed,
            "repeats": [run.to_json() for run in self.repeats],
        }
