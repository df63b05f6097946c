"""Finished rows as Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from baselines import METHODS

from quality_table.models import MODELS
from quality_table.plots import CUT, measure_name, plot_ratio, plot_seconds
from quality_table.rows import DENSE, Result, Row
from quality_table.run import TASKS, TEXTS, Settings
from slimgpt.evaluation.tasks import Answers, difference, flips, mean_of, stderr_of_mean

Rows = Sequence[tuple[Row, Result]]
EXACT = 0.002
"""How far the achieved share may be from the ratio."""

ABOUT_ABLATIONS = (
    "What is in brackets differs from the settings above. A row that calibrates on `wikitext2` (train text) is "
    "measured on the same kind of text; `auto` is text that the dense model writes, `self` such text by plain sampling."
)

YES_NO = ("boolq", "BoolQ")
ABOUT_YES_NO = (
    "also without BoolQ, where many of these models have one answer for nearly all questions, so that their accuracy "
    "says whether that is yes or no; *flips*: questions that the dense model gets right and the slim one wrong, or the "
    "other way round (arXiv 2407.09141), mean of the tasks"
)


def measure_names(validation: bool) -> list[str]:
    """The perplexities of the table."""
    return [measure_name(text, window, validation) for text, window in TEXTS]


def increase(result: Result, dense: Result, measure: str) -> float | None:
    """How much log-perplexity is above the dense model's."""
    value, base = result.value(measure), dense.value(measure)
    return None if value is None or base is None else math.log(value / base)


def _find(rows: Rows, model: str, title: str, ratio: float) -> Result | None:
    for row, result in rows:
        if (row.model, row.title, row.ratio) == (model, title, ratio) and result.measures:
            return result
    return None


def share_of_paper(rows: Rows, row: Row, result: Result, measure: str) -> float | None:
    """The increase in log-perplexity over dense, as a share of what `paper` costs at the same model and ratio."""
    dense, paper = _find(rows, row.model, DENSE, 0.0), _find(rows, row.model, "paper", row.ratio)
    if dense is None or paper is None or row.method == DENSE:
        return None
    own, theirs = increase(result, dense, measure), increase(paper, dense, measure)
    return None if own is None or not theirs else own / theirs


def way(result: Result) -> str:
    """How a row was worked out: the type of forward passes, and the device where that is no CPU."""
    dtype, device = result.settings["dtype"], result.found.get("versions", {}).get("device", "cpu")
    return dtype if device == "cpu" else f"{dtype} on {device}"


def ways_of(rows: Rows) -> list[str]:
    """How rows were worked out."""
    return sorted({way(result) for _, result in rows if result.measures})


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _zero_shot(result: Result, paper: Result | None, without: str | None = None) -> str:
    """The mean over the tasks with its standard error, and how far it is from `paper`'s on the same questions.

    Args:
        without: a task that is left out.
    """
    tasks = result.measures.get(TASKS)
    if tasks is None:
        return ""
    scores = [score for task, score in tasks["scores"].items() if task != without]
    error = stderr_of_mean(scores)
    text = _number(mean_of(scores), ".3f") + (f" ± {error:.3f}" if error else "")
    theirs = paper.measures.get(TASKS) if paper else None
    if theirs is None or theirs is tasks:
        return text
    apart = difference(_answers(theirs, without), _answers(tasks, without))
    return text + (f" ({apart[0]:+.3f} ± {apart[1]:.3f})" if apart else "")


def _flips(result: Result, dense: Result | None) -> str:
    """The share of questions that the row's model gets right and the dense one wrong, or the other way round."""
    measure, base = (one.measures.get(TASKS) if one else None for one in (result, dense))
    share = flips(_answers(base, None), _answers(measure, None)) if measure and base and measure is not base else None
    return _number(share, ".1%")


def _answers(measure: dict[str, Any], without: str | None) -> Answers:
    """A row's answers as the package has them."""
    right = {task: marks for task, marks in measure.get("right", {}).items() if task != without}
    return {task: dict(enumerate(map(float, marks))) for task, marks in right.items()}


def table(rows: Rows, settings: Settings, model: str, references: Rows = ()) -> list[str]:
    """The Markdown table of one model.

    Args:
        references: rows that others are compared with and that need not be shown.
    """
    known = [*rows, *references]
    measures = measure_names(settings.validation)
    dense = _find(known, model, DENSE, 0.0)
    tasks = any(result.value(TASKS) is not None for _, result in rows)
    several = len(ways_of(rows)) > 1
    heads = [
        "removed",
        "method",
        "achieved",
        *(["type"] if several else []),
        *(name.replace("@", ", ") for name in measures),
    ]
    heads += [f"share of `paper`'s increase, {measures[1]}", f"{measures[2]}"]
    heads += ["zero-shot mean", f"without {YES_NO[1]}", "flips"] if tasks else []
    heads += ["seconds", "core-seconds"]
    heads += [f"with our repair: {measures[1]}", measures[2]]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, result in rows:
        if row.model != model or row.repair or not result.measures:
            continue
        pruning = result.found
        achieved = pruning["achieved"]
        off = row.method != DENSE and abs(achieved - row.ratio) > EXACT
        paper = _find(known, model, "paper", row.ratio)
        repaired = _find(known, model, Row(model, row.method, row.ratio, True, row.changes).title, row.ratio)
        cells = [
            f"{row.ratio:.0%}",
            row.title,
            f"{achieved:.2%}" + (" (!)" if off else ""),
            *([way(result)] if several else []),
            *(_number(result.value(name)) for name in measures),
            *(_number(share_of_paper(known, row, result, name)) for name in measures[1:]),
            *(_zero_shot(result, paper, without) for without in ((None, YES_NO[0]) if tasks else ())),
            *([_flips(result, dense)] if tasks else []),
            _number(pruning.get("seconds"), ".0f"),
            _number(pruning.get("core_seconds"), ".0f"),
            *(_number(repaired.value(name) if repaired else None) for name in measures[1:]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(rows: Rows, ablations: Rows, settings: Settings, plots: Sequence[Path]) -> str:
    """The whole page."""
    extent = f"the first {settings.max_tokens:,} tokens of each text" if settings.max_tokens else "whole texts"
    known = [result for _, result in [*rows, *ablations] if result.measures]
    ways = ways_of([*rows, *ablations])
    several, tasks = len(ways) > 1, settings.tasks > 0
    commits = sorted({result.found["commit"] for result in known} - {""})
    used = {json.dumps(result.found["versions"]): result.found["versions"] for result in known}
    lines = [
        "# Quality at the same size",
        "",
        f"Perplexity after removing a share of the decoder layers' parameters. Every method had the same "
        f"{settings.num_samples} x {settings.seq_len} tokens of `{settings.source}` (seed {settings.seed}), "
        "and none had other text: the default's short training is on it, too, and a search's also on what the dense "
        f"model writes; {extent}, "
        f"windows of 128 or 512 tokens without overlap; forward passes in {' or '.join(ways)}"
        + (", as each row says: what is fast depends on the machine, so compare times of one kind" if several else "")
        + (f"; zero-shot mean of seven tasks, {settings.tasks} examples each, ± its standard error" if tasks else "")
        + (f" (and how far from `paper` on the same questions); {ABOUT_YES_NO}" if tasks else "")
        + ". C4 documents that are measured on are none that are calibrated on. `(!)` marks a share that is more than "
        "0.2 points off. *Share of `paper`'s increase*: how much log-perplexity rises over dense, `paper` being 1. "
        "Core-seconds are processor time, which a busy machine changes less than seconds. The plots end at "
        f"{CUT} times the dense model's perplexity; what is above has a hollow marker at the upper edge of the second.",
        "",
        "Written by `benchmarks/quality.py`"
        + (" on the validation texts." if settings.validation else ".")
        + " The JSON file beside it has the widths, protocols and every setting.",
        "",
    ]
    lines += [line for plot in plots for line in (f"![{plot.stem}]({plot.name})", "")]
    for model in dict.fromkeys(row.model for row, _ in rows):
        lines += [f"## {MODELS[model].title}", "", *table(rows, settings, model), ""]
    methods = dict.fromkeys(row.method for row, result in rows if row.method != DENSE and result.measures)
    lines += [f"- `{name}`: {METHODS[name].title}" for name in methods]
    lines += [""]
    shown = {row for row, _ in rows}
    for model in dict.fromkeys(row.model for row, result in ablations if result.measures and row not in shown):
        lines += [
            f"## Ablations, {MODELS[model].title}",
            "",
            ABOUT_ABLATIONS,
            "",
            *table(ablations, settings, model),
            "",
        ]
    for versions in used.values():
        lines += [
            "Made with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + f"; commit {', '.join(commits)}.",
            "",
        ]
    return "\n".join(lines)


def write(rows: Rows, ablations: Rows, settings: Settings, out: Path) -> list[Path]:
    """Write the page, the JSON file and the plots; `out` has no suffix."""
    out.parent.mkdir(parents=True, exist_ok=True)
    plots = [out.with_name(f"{out.name}-{kind}.png") for kind in ("ratio", "seconds")]
    if any(row.method != DENSE and result.measures for row, result in rows):
        plot_ratio(rows, settings.validation, plots[0])
        plot_seconds(rows, settings.validation, plots[1])
    else:
        plots = []
    page, data = out.with_suffix(".md"), out.with_suffix(".json")
    page.write_text(markdown(rows, ablations, settings, plots), encoding="utf-8")
    shown = {key: value for key, value in asdict(settings).items() if key != "paths"}
    content = {"settings": shown, "rows": [asdict(result) for _, result in [*rows, *ablations] if result.measures]}
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [page, data, *plots]
