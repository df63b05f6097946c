"""Work out rows: bring the model, prune it by the row's method, measure what is missing, keep it."""

from __future__ import annotations

import copy
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from baselines import METHODS
from baselines.units import Job, decoder_parameters, quiet
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimgpt
from quality_table.models import bring, run_in
from quality_table.rows import DENSE, Result, Row, Store
from quality_table.texts import CHAT, CHAT_ANSWERS, CHAT_TOKENS, SOURCES, Texts, self_written, sha256
from slimgpt.calibration import digest
from slimgpt.errors import CalibrationError
from slimgpt.evaluation import perplexity
from slimgpt.evaluation.tasks import answers, evaluate_tasks
from slimgpt.models.lookup import layer_sizes
from slimgpt.recovery.dataset import IGNORED, Example, collate
from slimgpt.runtime.devices import as_device
from slimgpt.runtime.versions import versions

TEXTS = (("wikitext2", 128), ("wikitext2", 512), ("c4", 512))
"""Held-out texts and windows of the table."""

TASKS = "tasks"
VALIDATION = "-validation"
KL = "kl-"
"""What the names of divergences from the dense model begin with."""


@dataclass(frozen=True)
class Settings:
    """The run's settings; a row may change those of the calibration.

    Args:
        source: what to calibrate on, a key of ``SOURCES``.
        num_samples: calibration windows.
        seq_len: tokens per window.
        seed: of the calibration text and of what methods draw.
        dtype: of the forward passes, in calibration and in evaluation.
        device: where they run; it decides how long a row takes, and nothing else but roundings.
        max_tokens: of each text; ``None`` takes all.
        validation: measure on the validation texts.
        tasks: examples of each zero-shot task; 0 leaves them out.
        paths: where models are that have no place of their own.
        texts: what perplexity is measured on, with windows; ``None``: :data:`TEXTS`.
        divergence: measure the KL divergence from the dense model, too, on the same texts.
    """

    source: str = "c4"
    num_samples: int = 128
    seq_len: int = 512
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    max_tokens: int | None = 32_768
    validation: bool = False
    tasks: int = 0
    paths: dict[str, str] = field(default_factory=dict)
    texts: tuple[tuple[str, int], ...] | None = None
    divergence: bool = False


DTYPES = ("float32", "bfloat16")
"""Types of forward passes that rows are looked for in."""

CALIBRATION = ("source", "num_samples", "seq_len", "seed")
"""The settings that a row may change; other changes are arguments of ``slimgpt.prune``."""

Say = Callable[[str, int, int], None]
"""``(what, done, total)``."""


class Bench:
    """Works rows out; models and windows are brought once."""

    def __init__(self, texts: Texts, store: Store, settings: Settings, say: Say = quiet, keep_models: bool = False):
        self.texts, self.store, self.settings, self.say = texts, store, settings, say
        self.keep_models = keep_models
        self.device = as_device(settings.device)
        self._model: tuple[str, PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._windows: dict[tuple[Any, ...], Tensor] = {}

    def decisive(self, row: Row, dtype: str | None = None) -> dict[str, Any]:
        """Everything that decides the slim model of a row; nothing long is done to find out.

        Args:
            dtype: of the forward passes, if not the run's.
        """
        dtype = dtype or self.settings.dtype
        if row.method == DENSE:
            return {"dtype": dtype, **self._path(row)}
        calibration = self._calibration(row)
        files = {"c4": "c4", "alpaca": "alpaca", "wikitext2": "wikitext2-train"}
        source = calibration["source"]
        if source not in SOURCES:
            raise CalibrationError(f"calibration source '{source}' is unknown; choose {', '.join(SOURCES)}")
        if source in files:
            calibration["text_sha256"] = _file_sha256(self.texts.file(files[source]))
        return {"calibration": calibration, "dtype": dtype, **self._path(row)}

    def measures(self, row: Row) -> dict[str, dict[str, Any]]:
        """What is measured of a row, and the settings each depends on."""
        suffix = VALIDATION if self.settings.validation else ""
        wanted: dict[str, dict[str, Any]] = {}
        for name, window in self.settings.texts or TEXTS:
            if name == CHAT:
                digest = _file_sha256(self.texts.file("alpaca"))
                wanted[CHAT] = {"answers": CHAT_ANSWERS, "max_length": CHAT_TOKENS, "text_sha256": digest}
                continue
            text = self.texts.held_out(name, self.settings.validation)
            protocol = {"window": window, "max_tokens": self.settings.max_tokens, "text_sha256": sha256(text)}
            wanted[f"{name}{suffix}@{window}"] = protocol
            if self.settings.divergence and row.method != DENSE:
                wanted[f"{KL}{name}{suffix}@{window}"] = protocol
        if self.settings.tasks:
            wanted[TASKS] = {"limit": self.settings.tasks}
        return wanted

    def missing(self, row: Row) -> list[str]:
        """The measures of a row that are still to be taken."""
        result = self.store.get(row, self.decisive(row))
        return [name for name, settings in self.measures(row).items() if not result.has(name, settings)]

    def result(self, row: Row) -> Result:
        """What is known of a row."""
        return self.store.get(row, self.decisive(row))

    def claim(self, row: Row) -> AbstractContextManager[bool]:
        """Whether this process may work on a row; see :meth:`quality_table.rows.Store.claim`."""
        return self.store.claim(row, self.decisive(row))

    def reported(self, row: Row) -> Result:
        """What is known of a row, from forward passes of another type if there were none of the run's: which type is
        fast is the machine's affair, and rows can come from several."""
        types = dict.fromkeys((self.settings.dtype, *DTYPES))
        known = [self.store.get(row, self.decisive(row, dtype)) for dtype in types]
        return next((result for result in known if result.measures), known[0])

    def work_out(self, row: Row, anew: bool = False) -> Result:
        """Take the missing measures of a row, and keep each as it is taken.

        Args:
            anew: forget what is known of the row.

        Raises:
            SlimGPTError: what the method refuses, such as too little text.
        """
        result = Result(self.result(row).row, self.decisive(row)) if anew else self.result(row)
        wanted = self.measures(row)
        missing = [name for name, settings in wanted.items() if not result.has(name, settings)]
        if not missing:
            return result
        if (kept := self._kept(row, result)) is not None:
            model, tokenizer = kept
        else:
            model, tokenizer, result.found = self._slim(row)
            if self.keep_models and row.method != DENSE and METHODS[row.method].ours:
                slimgpt.save(model, tokenizer, None, self._folder(row, result), overwrite=True)
                self.store.put(row, result)
        run_in(model, getattr(torch, self.settings.dtype))
        model.to(self.device)
        dense = self._dense(row) if any(name.startswith(KL) for name in missing) else None
        for name in missing:
            against = dense if name.startswith(KL) else None
            result.measures[name] = self._measure(model, tokenizer, name, wanted[name], against)
            self.store.put(row, result)
        return result

    def _folder(self, row: Row, result: Result) -> Path:
        """Where the slim model of a row is kept."""
        return self.store.file(row, result.settings).with_suffix("")

    def _kept(self, row: Row, result: Result) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
        """The slim model of a row from where it was kept, if it was and the row knows of it."""
        folder = self._folder(row, result)
        if not result.found or not folder.is_dir():
            return None
        return slimgpt.load(str(folder), dtype="float32")

    def _dense(self, row: Row) -> PreTrainedModel:
        """The dense model, as the slim one is run."""
        model = copy.deepcopy(self._bring(row.model)[0])
        run_in(model, getattr(torch, self.settings.dtype))
        return model.to(self.device)

    def _slim(self, row: Row) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
        dense, tokenizer = self._bring(row.model)
        model = copy.deepcopy(dense)
        before = decoder_parameters(model)
        about = {"commit": _commit(), "versions": versions(self.device), "threads": torch.get_num_threads()}
        if row.method == DENSE:
            return model, tokenizer, {"decoder_parameters": before, "achieved": 0.0, **about}
        windows = self.windows(row)
        arguments = tuple((name, value) for name, value in row.changes if name not in CALIBRATION)
        job = Job(
            windows,
            row.ratio,
            repair=True if row.repair else None,
            seed=int(self._calibration(row)["seed"]),
            # Windows of all lengths go through a layer with as many tokens.
            batch_size=max(1, (2048 if self.device.type == "cpu" else 16384) // windows.shape[1]),
            dtype=self.settings.dtype,
            device=self.device,
            arguments=arguments,
            on_step=lambda done, total: self.say("prune", done, total),
        )
        start, busy = time.perf_counter(), time.process_time()
        METHODS[row.method].apply(model, job)
        seconds, core_seconds = time.perf_counter() - start, time.process_time() - busy
        after = decoder_parameters(model)
        pruning = {
            "decoder_parameters": after,
            "achieved": 1 - after / before,
            "seconds": seconds,
            # A process that waits for a GPU is busy, too.
            "core_seconds": core_seconds if self.device.type == "cpu" else None,
            "calibration_sha256": digest(windows),
            "widths": layer_sizes(model.config),
            **job.info,
        }
        return model, tokenizer, {**pruning, **about}

    def windows(self, row: Row) -> Tensor:
        """The calibration windows of a row, ``(num_samples, seq_len)``."""
        wanted = self._calibration(row)
        key = (row.model, *wanted.values())
        if key not in self._windows:
            model, tokenizer = self._bring(row.model)
            if wanted["source"] == "mix":
                written = wanted["num_samples"] - wanted["num_samples"] // 3
                parts = (("auto", written), ("speeches", wanted["num_samples"] - written))
                changes = dict(row.changes)
                rows = [
                    replace(row, changes=tuple({**changes, "source": s, "num_samples": n}.items())) for s, n in parts
                ]
                self._windows[key] = torch.cat([self.windows(each) for each in rows])
            elif wanted["source"] == "auto":
                file = self.store.folder / f"windows-{'-'.join(map(str, key))}.safetensors"
                del wanted["source"]
                self._windows[key] = self_written(model, tokenizer, file, self.device, **wanted)
            else:
                self._windows[key] = self.texts.windows(tokenizer, **wanted)
        return self._windows[key]

    def _measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        settings: dict[str, Any],
        against: PreTrainedModel | None,
    ) -> dict[str, Any]:
        start, busy = time.perf_counter(), time.process_time()
        if name == TASKS:
            detail = self._tasks(model, tokenizer, settings["limit"])
            value = detail.pop("mean")
        elif name == CHAT:
            value, detail = answer_perplexity(model, self.texts.answers(tokenizer)), {}
        else:
            corpus = name.removeprefix(KL).partition("@")[0].removesuffix(VALIDATION)
            measured = perplexity(
                model,
                tokenizer,
                self.texts.held_out(corpus, self.settings.validation),
                settings["window"],
                settings["max_tokens"],
                progress=lambda done, total: self.say(name, done, total),
                against=against,
            )
            value, detail = measured.perplexity, {"predicted": measured.predicted, "protocol": measured.protocol}
            if measured.divergence is not None:
                value = measured.divergence.kl.mean
                detail |= {"stderr": measured.divergence.kl.stderr, "same_top": measured.divergence.same_top}
        seconds, core_seconds = time.perf_counter() - start, time.process_time() - busy
        return {"value": value, "settings": settings, "seconds": seconds, "core_seconds": core_seconds, **detail}

    def _tasks(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, Any]:
        def on_start(requests: int) -> Callable[[int], None]:
            done = 0

            def answer(count: int) -> None:
                nonlocal done
                done += count
                self.say(TASKS, done, requests)

            return answer

        scores = evaluate_tasks(model, tokenizer, limit=limit, data_dir=self.texts.folder, on_start=on_start)
        right = {task: "".join(str(int(by[n])) for n in sorted(by)) for task, by in answers(scores).items()}
        return {**scores.to_json(), "right": right}

    def _calibration(self, row: Row) -> dict[str, Any]:
        known = {name: getattr(self.settings, name) for name in CALIBRATION}
        return {**known, **{name: value for name, value in row.changes if name in CALIBRATION}}

    def _path(self, row: Row) -> dict[str, str]:
        path = self.settings.paths.get(row.model)
        return {"path": Path(path).name} if path else {}

    def _bring(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._model is None or self._model[0] != name:
            self._model = None  # the one before leaves memory first
            self._model = (name, *bring(name, self.settings.paths.get(name)))
        return self._model[1], self._model[2]


@torch.no_grad()
def answer_perplexity(model: PreTrainedModel, answers: Sequence[Example], batch: int = 8) -> float:
    """Perplexity of the tokens to be predicted; shorter conversations are padded behind their end."""
    total, count = 0.0, 0
    for first in range(0, len(answers), batch):
        rows = collate(answers[first : first + batch], 0)
        labels = rows.pop("labels")[:, 1:].to(model.device)
        logits = model(**{name: ids.to(model.device) for name, ids in rows.items()}, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return math.exp(total / count)


@cache
def _file_sha256(path: Path) -> str:
    return sha256(path.read_text(encoding="utf-8"))


@cache
def _commit() -> str:
    """The commit that measured a row, with a mark if something in the package was not committed."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
