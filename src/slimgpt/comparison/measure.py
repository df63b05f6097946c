"""Measurements of one model of a comparison: size, perplexity, tasks and pass key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.checkpoint.commands import commands, public_calibration
from slimgpt.checkpoint.inspecting import read_report
from slimgpt.comparison.cache import MeasurementCache
from slimgpt.comparison.columns import Column
from slimgpt.comparison.model_result import CompareConfig, ModelResult
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

    def measure(self, column: Column) -> ModelResult:
        """All measurements of a column; cached ones are read."""
        runs = [
            run
            for name, label in zip(column.models, column.labels)
            for run in _ModelMeasurer(self, name).measure(column.label, label, samples=name == column.models[0])
        ]
        first, *repeats = runs
        every = dict.fromkeys(command for run in runs for command in run.commands)
        return replace(first, repeats=repeats, commands=list(every))

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

    def measure(self, name: str, label: str, *, samples: bool) -> list[ModelResult]:
        """The results with all seeds."""
        config = self.common.config
        report = read_report(self.source.folder) if self.source.folder is not None else None
        plan = (report or {}).get("plan") or {}
        parameters = self.cache.get_or_measure(
            "parameters", lambda: sum(p.numel() for p in self.loaded[0].parameters())
        )
        result = ModelResult(name, parameters, plan.get("achieved"), folder=label)
        if report is not None and self.source.gguf_file is None:
            made = PruneReport.from_json(report)
            result.commands = commands(made)
            result.method, result.calibration = made.settings.method, public_calibration(made.calibration)
            result.kept = [layer.parameters / layer.parameters_before for layer in made.layers]
        notes = {text.name: contamination_note(report, text) for text in self.common.texts}
        result.leaks = {text: note for text, note in notes.items() if note}
        runs: list[ModelResult] = []
        for seed in [None] if config.seeds == 1 else range(config.seeds):
            runs.append(self._measured(result, seed, runs[0] if runs else None))
        if config.samples and samples:
            runs[0].samples = self._samples()
        return runs

    def _measured(self, result: ModelResult, seed: int | None, first: ModelResult | None) -> ModelResult:
        """The measurements with a seed.

        Args:
            result: what needs no seed.
            first: the result with the first seed; ``None`` for that one.
        """
        config, texts = self.common.config, self.common.texts
        run = replace(result, seed=seed)
        run.perplexities = [
            (text.name, self._perplexity(text, window, seed)) for text in texts for window in config.windows
        ]
        if config.tasks:
            alike = first is not None and first.tasks is not None and not first.tasks.protocol["seeded"]
            run.tasks = first.tasks if first is not None and alike else self._tasks(seed)
        if config.long_window:
            run.by_position = self._perplexity(texts[0], config.long_window, seed, by_position=True)
        if config.passkey:
            run.passkey = self._passkey(seed)
        return run

    def _perplexity(self, text: Text, window: int, seed: int | None, *, by_position: bool = False) -> Perplexity:
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
                    seed=seed,
                ).to_json()

        against = self.name != self.common.base and not by_position
        content = hashlib.sha256(text.content.encode()).hexdigest()
        settings = ["perplexity", content, text.joining, text.max_windows, window, max_tokens, by_position]
        settings += [_identity(self.common.base)] if against else []
        settings += _drawn(seed)
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

    def _tasks(self, seed: int | None) -> TaskScores:
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
                    seed=seed or 0,
                    draw_rows=seed is not None,
                )
            return scores.with_answers()

        rows = None if data_dir is None else stamp_rows(Path(data_dir).expanduser())
        settings = ["tasks", config.tasks, config.limit, config.num_fewshot, rows, config.chat_template]
        settings += _drawn(seed)
        return TaskScores.from_json(self.cache.get_or_measure(settings, measure))

    def _passkey(self, seed: int | None) -> Passkey:
        lengths = self.common.config.passkey

        def measure() -> dict[str, Any]:
            with self.common.progress_bar("pass key") as on_start:
                return passkey(*self.loaded, lengths, seed=seed or 0, on_start=on_start).to_json()

        return Passkey.from_json(self.cache.get_or_measure(["passkey", lengths, *_drawn(seed)], measure))

    def _samples(self) -> list[Sample]:
        count = self.common.config.samples

        def measure() -> list[dict[str, Any]]:
            with self.common.progress_bar("samples") as on_start:
                written = write_samples(*self.loaded, count, progress=on_start(count) if on_start else None)
            return [sample.to_json() for sample in written]

        settings = ["samples", QUESTIONS[:count], OPENINGS[:count], NEW_TOKENS]
        return [Sample.from_json(values) for values in self.cache.get_or_measure(settings, measure)]


def _drawn(seed: int | None) -> list[Any]:
    """The settings of a measurement that a seed adds."""
    return [] if seed is None else ["seed", seed]


def _identity(name: str) -> list[Any]:
    """JSON values that tell models of one name apart."""
    source = locate(name)
    return [source.location, fingerprint(source_files(source))]
