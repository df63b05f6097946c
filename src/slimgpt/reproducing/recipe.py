"""A table of the paper as a TOML file: which models, how they are pruned and trained, what is measured."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from slimgpt import assets
from slimgpt.config import PruneConfig
from slimgpt.errors import UsageError
from slimgpt.recovery.config import RecoverConfig

MEASURES = {
    "perplexity": "on every text of `texts` at every window of `windows`",
    "tasks": "accuracy on `tasks` of lm-evaluation-harness: the mean, and each in the JSON file",
    "cost": "seconds and peak memory of pruning",
    "speed": "prefill and decode tokens per second, peak memory, bytes on disk",
}

PRUNE_KEYS = {*PruneConfig.__dataclass_fields__, "calibration", "memory"}
RECOVER_KEYS = {*RecoverConfig.__dataclass_fields__, "data", "teacher"}

TINY_PRUNE = {"calibration": assets.DEMO, "num_samples": 4, "seq_len": 128}
TINY_RECOVER = {
    "data": assets.DEMO,
    "max_steps": 2,
    "batch_size": 2,
    "micro_batch": 2,
    "max_length": 64,
    "held_out": 2,
    "evaluations": 1,
}


@dataclass(frozen=True)
class Evaluation:
    """Settings of the measurements of a recipe.

    Args:
        measure: keys of :data:`MEASURES`.
        texts: for perplexity: files, or names that ``slimgpt evaluate --text`` knows.
        windows: tokens per window.
        max_tokens: use only the first so many tokens of a text.
        tasks: of lm-evaluation-harness, with commas between.
        num_fewshot: examples before a question; ``None``: as the task says.
        limit: use only the first so many rows of a task.
        prompt: tokens of the prompt whose speed is taken.
        new_tokens: tokens decoded after it.
    """

    measure: tuple[str, ...] = ("perplexity",)
    texts: tuple[str, ...] = ("wikitext2",)
    windows: tuple[int, ...] = (128,)
    max_tokens: int | None = None
    tasks: str = "commonsense"
    num_fewshot: int | None = None
    limit: int | None = None
    prompt: int = 512
    new_tokens: int = 128


@dataclass(frozen=True)
class RecipeRow:
    """One model of a recipe: a row of the table.

    Args:
        name: label in the table.
        model: a model as ``slimgpt prune`` takes it.
        prune: keywords of :func:`slimgpt.prune_folder`; ``None``: the model as it is.
        recover: keywords of :func:`slimgpt.recover`; ``None``: no training. The row is then measured twice.
        paper: the paper's figures, by column of the table; ``name + tuned`` for the row after training.
    """

    name: str
    model: str
    prune: dict[str, Any] | None
    recover: dict[str, Any] | None = None
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole table.

    Args:
        name: of the file, without its suffix.
        title: what the table shows.
        note: what a reader must know to compare.
        tiny: whether this is the small variant, on the demo model.
    """

    name: str
    title: str
    note: str
    evaluation: Evaluation
    rows: tuple[RecipeRow, ...]
    dtype: str = "auto"
    tiny: bool = False


RECIPE_KEYS = ("title", "note", "model", "dtype", "prune", "recover", "evaluation", "rows", "tiny")
ROW_KEYS = ("name", "model", "prune", "recover", "paper")


def read_recipe(file: Path, model: str | None = None, tiny: bool = False) -> Recipe:
    """A recipe from its TOML file, every key checked.

    Args:
        model: another model for all rows, such as a local copy.
        tiny: the small variant: the demo model and its text, a few windows, two training steps. The recipe's ``[tiny]``
            table may say which rows to keep, and what a row varies then.

    Raises:
        UsageError: it cannot be read, or holds an unknown key or value.
    """
    if not file.is_file():
        raise UsageError(f"cannot read the recipe {file}: it does not exist, or is no regular file")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the recipe {file}: {error}") from error
    _known(file, values, RECIPE_KEYS)
    for key in ("title", "model", "rows"):
        if key not in values:
            raise UsageError(f"{file} lacks the key '{key}'")
    rows = [_row(file, values, row) for row in values["rows"]]
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise UsageError(f"{file} has two rows of the same name")
    evaluation = _evaluation(file, values.get("evaluation", {}))
    if tiny:
        rows, evaluation = _tiny(file, rows, evaluation, values.get("tiny", {}))
    if model is not None:
        rows = [replace(row, model=model) for row in rows]
    return Recipe(
        name=file.stem,
        title=values["title"],
        note=values.get("note", ""),
        evaluation=evaluation,
        rows=tuple(rows),
        dtype="auto" if tiny else values.get("dtype", "auto"),
        tiny=tiny,
    )


def _row(file: Path, values: dict[str, Any], row: dict[str, Any]) -> RecipeRow:
    _known(file, row, ROW_KEYS)
    if "name" not in row:
        raise UsageError(f"{file}: a row has no name")
    prune, recover = (_options(values.get(part), row.get(part)) for part in ("prune", "recover"))
    if prune is None and recover is not None and "recover" not in row:
        recover = None  # the dense model's row: what all others share is not meant for it
    _known(file, prune or {}, PRUNE_KEYS)
    _known(file, recover or {}, RECOVER_KEYS)
    if recover is not None and "data" not in recover:
        raise UsageError(f"{file}, row '{row['name']}': recover needs `data`")
    return RecipeRow(row["name"], row.get("model", values["model"]), prune, recover, row.get("paper", {}))


def _options(shared: dict[str, Any] | None, own: dict[str, Any] | bool | None) -> dict[str, Any] | None:
    """A row's options over those that all rows share; ``false`` means none of it."""
    if own is False or (shared is None and own is None):
        return None
    return {**(shared or {}), **(own if isinstance(own, dict) else {})}


def _evaluation(file: Path, values: dict[str, Any]) -> Evaluation:
    _known(file, values, [f.name for f in fields(Evaluation)])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    evaluation = Evaluation(**values)
    unknown = [name for name in evaluation.measure if name not in MEASURES]
    if unknown:
        raise UsageError(f"{file}: measure '{unknown[0]}' is unknown; choose {', '.join(MEASURES)}")
    return evaluation


def _tiny(
    file: Path, rows: list[RecipeRow], evaluation: Evaluation, values: dict[str, Any]
) -> tuple[list[RecipeRow], Evaluation]:
    """Minutes instead of hours: everything that makes the run long is made small, what the table varies stays.

    ``keep`` names the rows that remain; ``vary`` gives by row what it varies, such as a smaller ``num_samples``.
    """
    _known(file, values, ("keep", "vary"))
    keep = values.get("keep")
    for name in keep or ():
        if name not in [row.name for row in rows]:
            raise UsageError(f"{file}: [tiny] keeps the row '{name}', which is not there")
    vary: dict[str, dict[str, Any]] = values.get("vary", {})
    small = []
    for row in rows:
        if keep is not None and row.name not in keep:
            continue
        prune = None if row.prune is None else {**row.prune, **TINY_PRUNE, **vary.get(row.name, {})}
        recover = None if row.recover is None else {**row.recover, **TINY_RECOVER}
        small.append(RecipeRow(row.name, assets.DEMO, prune, recover))
    measure = tuple(name for name in evaluation.measure if name != "tasks") or ("perplexity",)
    return small, replace(
        evaluation, measure=measure, texts=(assets.DEMO,), windows=(128,), max_tokens=1280, prompt=64, new_tokens=8
    )


def _known(file: Path, values: dict[str, Any], known: Any) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise UsageError(f"{file}: unknown key '{unknown[0]}'; known are {', '.join(sorted(known))}")
