"""A model and its slim versions, side by side: what was lost, what was won."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.folder import COMPARISON_FOLDER, check_output, new_folder
from slimgpt.comparison.kept import kept_folder
from slimgpt.comparison.page import write_page
from slimgpt.comparison.plots import plot_quality
from slimgpt.comparison.sides import Counter, Measuring, Side, Wanted
from slimgpt.comparison.timing import FIGURES, Timings, time_models
from slimgpt.evaluation import check_generation, check_protocol, check_tasks, read_text
from slimgpt.evaluation.tasks import answers, difference, flips, metric_of
from slimgpt.models.heterogeneous import check_context
from slimgpt.models.loading import load_config, locate


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

    Until these are there, what has been measured is kept beside them: a comparison that was killed goes on when the
    same one is asked for again. Speed is measured of all models in one run, and is not kept.

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
    check_output(output, overwrite, kind=COMPARISON_FOLDER)
    _check(names, wanted, data_dir, trust_remote_code)
    texts = [read_text(text, data_dir) for text in wanted.texts]
    kept = kept_folder(Path(output).expanduser().absolute())
    measuring = Measuring(wanted, texts, kept, data_dir, device, dtype, trust_remote_code, counter)
    with new_folder(output, overwrite, COMPARISON_FOLDER) as folder:
        sides = []
        for name, label in zip(names, _labels(names)):
            say(f"measuring {label}")
            sides.append(measuring.side(name, label))
        timings = None
        if wanted.batches:
            say("timing all models in turn")
            with measuring.bar("rounds") as on_start:
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
    shutil.rmtree(kept, ignore_errors=True)
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
            sided = [(side.name, side.tasks.one_sided().get(task)) for side in sides if side.tasks]
            notes = [f"{name} answers {words} of the questions" for name, words in sided if words]
            style = ".1%" if metric.startswith("acc") else ".4g"
            yield Row("tasks", f"{task} ({metric})", values, style, "more", "; ".join(notes))
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
        for name, (title, scale, style, better) in FIGURES.items():
            values = [getattr(row, name) for row in rows]
            yield Row(
                f"speed, batch {batch}", title, tuple(None if v is None else v / scale for v in values), style, better
            )
