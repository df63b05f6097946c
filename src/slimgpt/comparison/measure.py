"""The figures of one model of a comparison, but its speed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.checkpoint.inspecting import read_report
from slimgpt.comparison.cache import Kept
from slimgpt.evaluation.contamination import contamination_note
from slimgpt.evaluation.corpora import Text
from slimgpt.evaluation.evaluate import evaluate
from slimgpt.evaluation.passkey_retrieval import Passkey, passkey
from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.task_rows import stamp_rows
from slimgpt.evaluation.tasks import TaskScores, evaluate_tasks
from slimgpt.models.fingerprint import fingerprint, source_files
from slimgpt.models.loading import load
from slimgpt.models.source import locate
from slimgpt.runtime.devices import as_device
from slimgpt.runtime.versions import versions

Counter = Callable[[str], AbstractContextManager[Callable[[int], Callable[[int], None]]]]
"""Given a unit, opens a bar: told an amount, it gives what is called as the work is done."""


@dataclass(frozen=True)
class CompareConfig:
    """What to measure.

    Args:
        texts: as :func:`slimgpt.evaluation.read_text` takes them.
        windows: of every text.
        max_tokens: of every text.
        tasks: of lm-evaluation-harness; none if empty.
        limit: rows of every task.
        long_window: also perplexity by position up to here, on the first text; left out if ``None``.
        passkey: lengths of texts that hide a number.
        batches, prompt, new_tokens, rounds: of the timing; no timing if there are no batches.
    """

    texts: tuple[str, ...] = ("demo",)
    windows: tuple[int, ...] = (128,)
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    long_window: int | None = None
    passkey: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    prompt: int = 512
    new_tokens: int = 128
    rounds: int = 5


@dataclass
class Side:
    """Everything measured of one model but its speed.

    Args:
        name: as the table has it.
        perplexities: with the name of the text.
        leaks: by text, what has to be said.
    """

    name: str
    parameters: int
    removed: float | None
    perplexities: list[tuple[str, Perplexity]] = field(default_factory=list)
    leaks: dict[str, str] = field(default_factory=dict)
    tasks: TaskScores | None = None
    by_position: Perplexity | None = None
    passkey: Passkey | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {
            **{name: getattr(self, name) for name in ("name", "parameters", "removed", "leaks")},
            "perplexities": [{"text": text, **found.to_json()} for text, found in self.perplexities],
            "tasks": self.tasks and self.tasks.to_json(),
            "by_position": self.by_position and self.by_position.to_json(),
            "passkey": self.passkey and self.passkey.to_json(),
        }


@dataclass
class Measurer:
    """How the models of a comparison are measured.

    Args:
        texts: read already.
        folder: where measurements are kept until the comparison is whole.
        data_dir: rows of tasks; from the hub if ``None``.
        counter: opens a progress bar.
    """

    wanted: CompareConfig
    texts: Sequence[Text]
    folder: Path
    data_dir: str | Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    counter: Counter | None = None

    def side(self, name: str, label: str) -> Side:
        """Everything wanted of a model; what an earlier run has kept is not measured again.

        Args:
            name: a model as :func:`slimgpt.load` takes it.
            label: as the table has it.
        """
        return _Model(self, name).side(label)

    def bar(self, unit: str) -> AbstractContextManager[Any]:
        """A progress bar, if there are any."""
        return self.counter(unit) if self.counter else nullcontext()


class _Model:
    """One of the models; it is loaded once something has to be measured."""

    def __init__(self, how: Measurer, name: str):
        self.how, self.name = how, name
        self.source = locate(name)
        found = versions(as_device(how.device))
        self.kept = Kept(
            how.folder,
            {
                "model": [self.source.location, fingerprint(source_files(self.source))],
                "dtype": how.dtype,
                "versions": {name: found[name] for name in ("slimgpt", "torch", "transformers", "device")},
            },
        )

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load(self.name, self.how.dtype, self.how.device, self.how.trust_remote_code)

    def side(self, label: str) -> Side:
        wanted, texts = self.how.wanted, self.how.texts
        report = read_report(self.source.folder) if self.source.folder is not None else None
        plan = (report or {}).get("plan") or {}
        parameters = self.kept("parameters", lambda: sum(p.numel() for p in self.loaded[0].parameters()))
        side = Side(label, parameters, plan.get("achieved"))
        for text in texts:
            note = contamination_note(report, text)
            if note:
                side.leaks[text.name] = note
            side.perplexities += [(text.name, self._perplexity(text, window)) for window in wanted.windows]
        if wanted.tasks:
            side.tasks = self._tasks()
        if wanted.long_window:
            side.by_position = self._perplexity(texts[0], wanted.long_window, by_position=True)
        if wanted.passkey:
            side.passkey = self._passkey()
        return side

    def _perplexity(self, text: Text, window: int, by_position: bool = False) -> Perplexity:
        max_tokens = self.how.wanted.max_tokens

        def measure() -> dict[str, Any]:
            with self.how.bar(f"windows of {window}, {Path(text.name).name}") as on_start:
                step: list[Any] = []

                def progress(done: int, total: int) -> None:
                    if on_start and not step:
                        step.extend((on_start(total), 0))
                    if step:
                        step[0](done - step[1])
                        step[1] = done

                return evaluate(
                    *self.loaded, text, window=window, max_tokens=max_tokens, by_position=by_position, progress=progress
                ).to_json()

        content = hashlib.sha256(text.content.encode()).hexdigest()
        about = ["perplexity", content, text.joining, text.max_windows, window, max_tokens, by_position]
        return Perplexity.from_json(self.kept(about, measure))

    def _tasks(self) -> TaskScores:
        wanted, data_dir = self.how.wanted, self.how.data_dir

        def measure() -> dict[str, Any]:
            with self.how.bar("answers") as on_start:
                found = evaluate_tasks(*self.loaded, wanted.tasks, wanted.limit, wanted.num_fewshot, data_dir, on_start)
            return found.with_answers()

        rows = None if data_dir is None else stamp_rows(Path(data_dir).expanduser())
        return TaskScores.from_json(self.kept(["tasks", wanted.tasks, wanted.limit, wanted.num_fewshot, rows], measure))

    def _passkey(self) -> Passkey:
        lengths = self.how.wanted.passkey

        def measure() -> dict[str, Any]:
            with self.how.bar("questions") as on_start:
                return passkey(*self.loaded, lengths, on_start=on_start).to_json()

        return Passkey.from_json(self.kept(["passkey", lengths], measure))
