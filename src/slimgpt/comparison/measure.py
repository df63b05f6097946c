"""Measurements of one model of a comparison: size, perplexity, tasks and pass key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.checkpoint.commands import commands, public_calibration
from slimgpt.checkpoint.inspecting import read_report
from slimgpt.comparison.cache import MeasurementCache
from slimgpt.errors import UsageError
from slimgpt.evaluation.contamination import contamination_note
from slimgpt.evaluation.corpora import Text
from slimgpt.evaluation.evaluate import check_same_tokens, evaluate
from slimgpt.evaluation.passkey_retrieval import Passkey, passkey
from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.samples import NEW_TOKENS, OPENINGS, QUESTIONS, Sample, write_samples
from slimgpt.evaluation.task_rows import stamp_rows
from slimgpt.evaluation.tasks import TaskScores, evaluate_tasks
from slimgpt.models.fingerprint import fingerprint, source_files
from slimgpt.models.loading import load
from slimgpt.models.source import locate
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.devices import as_device
from slimgpt.runtime.versions import resume_versions

ProgressFactory = Callable[[str], AbstractContextManager[Callable[[int], Callable[[int], None]]]]
"""Opens a progress bar for a unit; called with the total, the bar returns a function that adds finished work."""


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


@dataclass
class ModelResult:
    """Measurements of one model, without its speed.

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
        }


@dataclass
class Measurer:
    """Measures the models of a comparison with the same settings.

    The base is loaded once, at the first measurement that needs it, and stays: every slim model is held against it.

    Args:
        base: the dense model, as :func:`slimgpt.load` takes it.
        texts: the texts of ``config``, read.
        cache_folder: folder of the :class:`MeasurementCache` files.
        data_dir: rows of tasks; from the hub if ``None``.
        new_progress: opens a progress bar.
    """

    base: str
    config: CompareConfig
    texts: Sequence[Text]
    cache_folder: Path
    data_dir: str | Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    new_progress: ProgressFactory | None = None

    def measure(self, name: str, label: str) -> ModelResult:
        """All measurements of a model; cached ones are read.

        Args:
            name: a model as :func:`slimgpt.load` takes it.
            label: name in the table.
        """
        return _ModelMeasurer(self, name).measure(label)

    @cached_property
    def loaded_base(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The base and its tokenizer."""
        return self.load(self.base)

    def load(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model of the comparison and its tokenizer."""
        return load(name, self.dtype, self.device, self.trust_remote_code)

    def progress_bar(self, unit: str) -> AbstractContextManager[Any]:
        """A progress bar, or a context that yields ``None``."""
        return self.new_progress(unit) if self.new_progress else nullcontext()


class _ModelMeasurer:
    """Measures one model, which is loaded at the first measurement that is not cached."""

    def __init__(self, common: Measurer, name: str):
        self.common, self.name = common, name
        self.source = locate(name)
        self.cache = MeasurementCache(
            common.cache_folder,
            {
                "model": _identity(name),
                "dtype": common.dtype,
                "versions": resume_versions(as_device(common.device)),
            },
        )

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.common.loaded_base if self.name == self.common.base else self.common.load(self.name)

    def measure(self, label: str) -> ModelResult:
        config, texts = self.common.config, self.common.texts
        report = read_report(self.source.folder) if self.source.folder is not None else None
        plan = (report or {}).get("plan") or {}
        parameters = self.cache.get_or_measure(
            "parameters", lambda: sum(p.numel() for p in self.loaded[0].parameters())
        )
        result = ModelResult(label, parameters, plan.get("achieved"))
        if report is not None and self.source.gguf_file is None:
            made = PruneReport.from_json(report)
            result.commands = commands(made)
            result.method, result.calibration = made.settings.method, public_calibration(made.calibration)
            result.kept = [layer.parameters / layer.parameters_before for layer in made.layers]
        for text in texts:
            note = contamination_note(report, text)
            if note:
                result.leaks[text.name] = note
            result.perplexities += [(text.name, self._perplexity(text, window)) for window in config.windows]
        if config.tasks:
            result.tasks = self._tasks()
        if config.long_window:
            result.by_position = self._perplexity(texts[0], config.long_window, by_position=True)
        if config.passkey:
            result.passkey = self._passkey()
        if config.samples:
            result.samples = self._samples()
        return result

    def _perplexity(self, text: Text, window: int, by_position: bool = False) -> Perplexity:
        max_tokens = self.common.config.max_tokens

        def measure() -> dict[str, Any]:
            with self.common.progress_bar(f"{Path(text.name).name}, window {window}") as on_start:
                step: list[Any] = []

                def progress(done: int, total: int) -> None:
                    if on_start and not step:
                        step.extend((on_start(total), 0))
                    if step:
                        step[0](done - step[1])
                        step[1] = done

                return evaluate(
                    *self.loaded,
                    text,
                    window=window,
                    max_tokens=max_tokens,
                    by_position=by_position,
                    progress=progress,
                    against=self._base_for(text) if against else None,
                ).to_json()

        against = self.name != self.common.base and not by_position
        content = hashlib.sha256(text.content.encode()).hexdigest()
        settings = ["perplexity", content, text.joining, text.max_windows, window, max_tokens, by_position]
        settings += [_identity(self.common.base)] if against else []
        return Perplexity.from_json(self.cache.get_or_measure(settings, measure))

    def _base_for(self, text: Text) -> PreTrainedModel | None:
        """The base, unless its predictions are of other tokens than this model's."""
        base, tokenizer = self.common.loaded_base
        vocabularies = [one.config.get_text_config(decoder=True).vocab_size for one in (base, self.loaded[0])]
        try:
            check_same_tokens(self.loaded[1], tokenizer, text.content)
        except UsageError:
            return None
        return base if vocabularies[0] == vocabularies[1] else None

    def _tasks(self) -> TaskScores:
        config, data_dir = self.common.config, self.common.data_dir

        def measure() -> dict[str, Any]:
            with self.common.progress_bar("tasks") as on_start:
                scores = evaluate_tasks(
                    *self.loaded,
                    config.tasks,
                    config.limit,
                    config.num_fewshot,
                    data_dir,
                    on_start,
                    chat_template=config.chat_template,
                    confirm_run_unsafe_code=config.confirm_run_unsafe_code,
                )
            return scores.with_answers()

        rows = None if data_dir is None else stamp_rows(Path(data_dir).expanduser())
        settings = ["tasks", config.tasks, config.limit, config.num_fewshot, rows, config.chat_template]
        return TaskScores.from_json(self.cache.get_or_measure(settings, measure))

    def _passkey(self) -> Passkey:
        lengths = self.common.config.passkey

        def measure() -> dict[str, Any]:
            with self.common.progress_bar("pass key") as on_start:
                return passkey(*self.loaded, lengths, on_start=on_start).to_json()

        return Passkey.from_json(self.cache.get_or_measure(["passkey", lengths], measure))

    def _samples(self) -> list[Sample]:
        count = self.common.config.samples

        def measure() -> list[dict[str, Any]]:
            with self.common.progress_bar("samples") as on_start:
                written = write_samples(*self.loaded, count, progress=on_start(count) if on_start else None)
            return [sample.to_json() for sample in written]

        settings = ["samples", QUESTIONS[:count], OPENINGS[:count], NEW_TOKENS]
        return [Sample.from_json(values) for values in self.cache.get_or_measure(settings, measure)]


def _identity(name: str) -> list[Any]:
    """JSON values that tell models of one name apart."""
    source = locate(name)
    return [source.location, fingerprint(source_files(source))]
