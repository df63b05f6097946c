"""A model and its slim versions, side by side: what was lost, what was won."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slimgpt.api import evaluate
from slimgpt.checkpoint import new_folder, read_report
from slimgpt.comparison.page import write_page
from slimgpt.comparison.plots import plot_quality
from slimgpt.comparison.timing import Timings, time_models
from slimgpt.evaluation import (
    Passkey,
    Perplexity,
    TaskScores,
    Text,
    check_generation,
    check_protocol,
    check_tasks,
    evaluate_tasks,
    leak_note,
    passkey,
    read_text,
)
from slimgpt.evaluation.tasks import answers, difference, flips, metric_of
from slimgpt.models.heterogeneous import check_context
from slimgpt.models.loading import load, load_config, locate

Counter = Callable[[str], AbstractContextManager[Callable[[int], Callable[[int], None]]]]
"""Given a unit, opens a bar: told an amount, it gives what is called as the work is done."""


@dataclass(frozen=True)
class Wanted:
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


@dataclass(frozen=True)
class Comparison:
    """The base first, then the slim models in the order given."""

    sides: tuple[Side, ...]
    timings: Timings | None
    wanted: Wanted

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return {
            "models": [side.to_json() for side in self.sides],
            "speed": self.timings and self.timings.to_json(),
            "wanted": asdict(self.wanted),
        }

    def table(self) -> list[Row]:
        """The rows of the table: what, and a value for every model."""
        return list(_rows(self))


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        group: under which heading it stands.
        values: one per model; ``None`` where it was not measured.
        style: a format specification, ``%`` and units handled by :meth:`text`.
        better: ``"less"``, ``"more"``, or nothing.
    """

    group: str
    name: str
    values: tuple[float | None, ...]
    style: str
    better: str = ""
    note: str = ""

    def text(self, index: int) -> str:
        """The value of a model as it is printed."""
        value = self.values[index]
        return "-" if value is None else format(value, self.style)

    def change(self, index: int) -> float | None:
        """The value over the base's."""
        value, base = self.values[index], self.values[0]
        return value / base if index and value is not None and base else None


def compare(
    base: str,
    slim: Sequence[str],
    output: str | Path,
    wanted: Wanted | None = None,
    *,
    data_dir: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] = str,
    counter: Counter | None = None,
) -> Comparison:
    """Measure a model and its slim versions; write ``compare.json``, ``quality.png``, ``quality.svg``, ``report.html``.

    Args:
        base: a model as :func:`slimgpt.load` takes it.
        slim: one or more others.
        output: the folder to write.
        data_dir: where named texts and rows of tasks are files; from the hub if not given.
        say: told what happens next.
        counter: opens a progress bar.

    Raises:
        SlimGPTError: a model, a text or a task cannot be had; the folder exists.
    """
    wanted = wanted or Wanted()
    names = [base, *slim]
    _check(names, wanted, data_dir, trust_remote_code)
    texts = [read_text(text, data_dir) for text in wanted.texts]
    with new_folder(output, overwrite, marker="compare.json") as folder:
        sides = []
        for name, label in zip(names, _labels(names)):
            say(f"measuring {label}")
            sides.append(_measure(name, label, texts, wanted, data_dir, device, dtype, trust_remote_code, counter))
        timings = None
        if wanted.batches:
            say("timing all models in turn")
            with _open(counter, "rounds") as on_start:
                step = on_start(len(wanted.batches) * (wanted.rounds + 1)) if on_start else None
                timings = time_models(
                    names,
                    base,
                    wanted.batches,
                    wanted.prompt,
                    wanted.new_tokens,
                    wanted.rounds,
                    device,
                    dtype,
                    trust_remote_code,
                    progress=lambda *_: step(1) if step else None,
                )
        found = Comparison(tuple(sides), timings, wanted)
        (folder / "compare.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
        for suffix in ("png", "svg"):
            plot_quality(found, folder / f"quality.{suffix}")
        write_page(found, folder / "report.html")
    return found


def _check(names: Sequence[str], wanted: Wanted, data_dir: str | Path | None, trust_remote_code: bool) -> None:
    """Refuse what cannot be measured of every model before the first one is."""
    windows = [*wanted.windows, *([] if wanted.long_window is None else [wanted.long_window])]
    for window in windows:
        check_protocol(window)
    for source in [locate(name) for name in names]:
        config = load_config(source, trust_remote_code)
        for window in windows:
            check_context(config, "a window", window)
        for length in wanted.passkey:
            check_context(config, "a text", length)
        for batch in wanted.batches:
            check_generation(config, wanted.prompt, wanted.new_tokens, wanted.rounds, batch)
    if wanted.tasks:
        check_tasks(wanted.tasks, wanted.limit, wanted.num_fewshot, data_dir)


def _measure(
    name: str,
    label: str,
    texts: Sequence[Text],
    wanted: Wanted,
    data_dir: str | Path | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    counter: Counter | None,
) -> Side:
    folder = locate(name).folder
    report = read_report(folder) if folder is not None else None
    model, tokenizer = load(name, dtype, device, trust_remote_code)
    plan = (report or {}).get("plan") or {}
    side = Side(label, sum(p.numel() for p in model.parameters()), plan.get("achieved"))

    def of(text: Text, window: int, by_position: bool = False) -> Perplexity:
        with _open(counter, f"windows of {window}, {Path(text.name).name}") as on_start:
            step: list[Any] = []

            def progress(done: int, total: int) -> None:
                if on_start and not step:
                    step.extend((on_start(total), 0))
                if step:
                    step[0](done - step[1])
                    step[1] = done

            return evaluate(
                model, tokenizer, text, window=window, max_tokens=wanted.max_tokens, by_position=by_position,
                progress=progress,
            )  # fmt: skip

    for text in texts:
        note = leak_note(report, text)
        if note:
            side.leaks[text.name] = note
        side.perplexities += [(text.name, of(text, window)) for window in wanted.windows]
    if wanted.tasks:
        with _open(counter, "answers") as on_start:
            side.tasks = evaluate_tasks(
                model, tokenizer, wanted.tasks, wanted.limit, wanted.num_fewshot, data_dir, on_start
            )
    if wanted.long_window:
        side.by_position = of(texts[0], wanted.long_window, by_position=True)
    if wanted.passkey:
        with _open(counter, "questions") as on_start:
            side.passkey = passkey(model, tokenizer, wanted.passkey, on_start=on_start)
    return side


def _open(counter: Counter | None, unit: str) -> AbstractContextManager[Any]:
    return counter(unit) if counter else nullcontext()


def _labels(names: Sequence[str]) -> list[str]:
    """Short names, told apart where two folders have the same."""
    short = [locate(name).name for name in names]
    return [label if short.count(label) == 1 else name for label, name in zip(short, names)]


def _rows(found: Comparison) -> Iterator[Row]:
    sides = found.sides
    yield Row("size", "parameters", tuple(float(side.parameters) for side in sides), ",.0f", "less")
    if found.timings:
        first = {row.model: row for row in reversed(found.timings.rows)}
        order = list(dict.fromkeys(row.model for row in found.timings.rows))
        sizes = tuple(float(first[name].bytes) for name in order)
        each = [size / side.parameters for size, side in zip(sizes, sides)]
        # Weights of one model may be quantised, which its ratio to others would hide.
        alike = max(each) < 1.5 * min(each)
        note = "" if alike else f"stored with {', '.join(f'{size:.2g}' for size in each)} bytes per parameter"
        yield Row("size", "bytes on disk", sizes, ",.0f", "less", note)
    for index, (text, one) in enumerate(sides[0].perplexities):
        values = tuple(side.perplexities[index][1] for side in sides)
        notes = [f"{side.name}: {side.leaks[text]}" for side in sides if text in side.leaks]
        name = f"perplexity, {Path(text).name}, window {one.window}"
        yield Row("quality", name, tuple(v.perplexity for v in values), ",.2f", "less", "; ".join(notes))
    tasks = [side.tasks for side in sides]
    if tasks[0] is not None:
        for task, metrics in tasks[0].scores.items():
            metric = metric_of(metrics) or next(iter(metrics))
            values = tuple(t.scores[task].get(metric) if t else None for t in tasks)
            yield Row("tasks", f"{task} ({metric})", values, ".1%" if metric.startswith("acc") else ".4g", "more")
        if tasks[0].mean is not None:
            base = answers(tasks[0])
            apart = [(side.name, difference(base, answers(side.tasks))) for side in sides[1:] if side.tasks]
            notes = [f"{name}: {100 * one[0]:+.1f} ± {100 * one[1]:.1f} points" for name, one in apart if one]
            note = f"on the same questions, with standard error, {'; '.join(notes)}" if notes else ""
            yield Row("tasks", "mean", tuple(t.mean if t else None for t in tasks), ".1%", "more", note)
            changed = [flips(base, answers(side.tasks)) if side.tasks else None for side in sides[1:]]
            if any(share is not None for share in changed):
                note = "questions that the base gets right and the slim model wrong, or the other way round"
                yield Row("tasks", "flips", (None, *changed), ".1%", "less", note)
    if sides[0].by_position and sides[0].by_position.by_position:
        for start in sides[0].by_position.by_position:
            last = min(2 * start, sides[0].by_position.window) - 1
            values = tuple(
                s.by_position.by_position[start] for s in sides if s.by_position and s.by_position.by_position
            )
            place = f"positions {start}-{last}" if last > start else f"position {start}"
            yield Row("long texts", f"perplexity, {place}", values, ",.2f", "less")
    if sides[0].passkey:
        for length in sides[0].passkey.found:
            shares = tuple(side.passkey.found[length] if side.passkey else None for side in sides)
            yield Row("long texts", f"pass key found in {length:,} tokens", shares, ".0%", "more")
    yield from _speed_rows(found)


def _speed_rows(found: Comparison) -> Iterator[Row]:
    if not found.timings:
        return
    for batch in found.wanted.batches:
        rows = [row for row in found.timings.rows if row.batch == batch]
        for name, title, scale, style, better in (
            ("prefill", "prefill, tokens per second", 1, ",.0f", "more"),
            ("decode", "decode, tokens per second", 1, ",.1f", "more"),
            ("first_token", "first token, ms", 1e-3, ",.0f", "less"),
            ("peak_memory", "peak memory, MB", 1e6, ",.0f", "less"),
            ("prefill_flops", "MFLOPs per prompt token", 1e6, ",.0f", "less"),
            ("decode_flops", "MFLOPs per new token", 1e6, ",.0f", "less"),
        ):
            values = [getattr(row, name) for row in rows]
            yield Row(
                f"speed, batch {batch}", title, tuple(None if v is None else v / scale for v in values), style, better
            )
