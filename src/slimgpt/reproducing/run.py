"""Run a recipe row by row; finished rows are saved, so that a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from slimgpt.config import make_config
from slimgpt.errors import OutputError, UsageError
from slimgpt.io.atomic import write_text
from slimgpt.models.loading import load_config
from slimgpt.models.source import locate
from slimgpt.pipeline.to_folder import prune_folder
from slimgpt.recovery.checks import make_recovery_config
from slimgpt.recovery.run import recover
from slimgpt.reproducing.measuring import measure_model, peak_of
from slimgpt.reproducing.recipe import Evaluation, Recipe, RecipeRow, read_recipe
from slimgpt.reproducing.result import TUNED, Result
from slimgpt.reproducing.table import table
from slimgpt.runtime.devices import as_device
from slimgpt.runtime.versions import versions

RECIPES = Path(__file__).parents[3] / "recipes"
"""Where the recipes are in a clone of the repository."""


def reproduce(
    recipe: str | Path,
    out: str | Path,
    *,
    tiny: bool = False,
    model: str | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
    keep_models: bool = False,
    overwrite: bool = False,
    on_row: Callable[[int, int, str], None] | None = None,
) -> tuple[Recipe, list[Result]]:
    """Work through a recipe; the table is in ``out/NAME.md`` and ``out/NAME.json`` and grows row by row.

    Args:
        recipe: a TOML file, or the name of one in ``recipes/`` of the repository.
        out: a folder, made if need be; rows that an earlier run of the same recipe finished there are not done again.
        tiny: the small variant on the demo model.
        model: another model for all rows, such as a local copy.
        data_dir: files with the rows of the tasks, as for ``slimgpt evaluate``.
        keep_models: keep the pruned and trained models below ``out/models``.
        overwrite: do finished rows again.
        on_row: called before a row with its number, the number of rows, and what is done with it.

    Raises:
        UsageError: a recipe that cannot be read or a value in it that is refused, before any row is begun.
        SlimGPTError: whatever pruning, training or measuring raises; finished rows are kept.
    """
    file = find_recipe(recipe)
    loaded = read_recipe(file, model, tiny)
    _check(loaded)
    folder = Path(out).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give a folder")
    work = folder / f"{loaded.name}-tiny" if tiny else folder / loaded.name
    (work / "rows").mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for number, row in enumerate(loaded.rows):
        request = _request(loaded, row, device)
        row_file = work / "rows" / f"{slug(row.name)}.json"
        row_results = None if overwrite else _read_finished(row_file, request)
        if row_results is None:
            say = (lambda text, n=number: on_row(n, len(loaded.rows), text)) if on_row else str
            row_results = _run_row(loaded, row, work / "models", device, data_dir, keep_models, say)
            content = {"request": request, "results": [asdict(result) for result in row_results]}
            write_text(row_file, json.dumps(content, indent=1))
        results += row_results
        values = {
            "recipe": asdict(loaded),
            "results": [asdict(result) for result in results],
            "versions": versions(as_device(device)),
        }
        write_text(folder / f"{work.name}.json", json.dumps(values, indent=1))
        write_text(folder / f"{work.name}.md", table(loaded, results))
    if not keep_models:
        shutil.rmtree(work / "models", ignore_errors=True)
    return loaded, results


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe.

    Raises:
        UsageError: there is none of that name.
    """
    for file in (Path(recipe).expanduser(), RECIPES / f"{recipe}.toml"):
        if file.is_file():
            return file
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml"))) or "none here; give a file"
    raise UsageError(f"no recipe '{recipe}'; there are {names}")


def _check(recipe: Recipe) -> None:
    """Check the settings and models of all rows before the first one runs."""
    for row in recipe.rows:
        if row.prune is not None:
            make_config(**{key: value for key, value in row.prune.items() if key not in ("calibration", "memory")})
        if row.recover is not None:
            make_recovery_config(**{key: value for key, value in row.recover.items() if key not in ("data", "teacher")})
    for model in {row.model for row in recipe.rows}:
        load_config(locate(model))


def _run_row(
    recipe: Recipe,
    row: RecipeRow,
    models: Path,
    device: str,
    data_dir: str | Path | None,
    keep_models: bool,
    say: Callable[[str], object],
) -> list[Result]:
    task_folder = Path(data_dir).expanduser() if data_dir is not None else None

    def measure(
        model: str, suffix: str, evaluation: Evaluation, more: dict[str, float], details: dict[str, Any]
    ) -> Result:
        say(f"{row.name}{suffix}: measuring")
        figures, measured_details = measure_model(model, evaluation, device, recipe.dtype, task_folder)
        paper = {
            column.removesuffix(TUNED): value
            for column, value in row.paper.items()
            if column.endswith(TUNED) == bool(suffix)
        }
        return Result(row.name + suffix, {**figures, **more}, paper, {**details, **measured_details})

    if row.prune is None:
        return [measure(row.model, "", recipe.evaluation, {}, {})]
    slim, tuned = models / slug(row.name), models / f"{slug(row.name)}-tuned"
    say(f"{row.name}: pruning")
    with peak_of(as_device(device)) as peak:
        report = prune_folder(
            row.model, slim, device=device, dtype=recipe.dtype, resume=True, **{"seed": 0, **row.prune}
        )
    cost = {"removed, %": 100 * report.plan.achieved}
    if "cost" in recipe.evaluation.measure:
        cost["pruning, s"] = report.seconds
        cost |= {"pruning, peak GB": peak.bytes / 1e9} if peak.bytes is not None else {}
    details = {"plan": report.plan.to_json(), "settings": asdict(report.settings)}
    results = [measure(str(slim), "", recipe.evaluation, cost, details)]
    if row.recover is not None:
        say(f"{row.name}: training")
        if not tuned.is_dir():
            options = dict(row.recover)
            if options.get("method") == "distill":
                options.setdefault("teacher", row.model)
            outcome = recover(slim, tuned, options.pop("data"), device=device, resume=True, **options)
            training = outcome.to_json()
        else:
            training = json.loads((tuned / "recovery.json").read_text(encoding="utf-8"))
        evaluation = replace(recipe.evaluation, measure=tuple(m for m in recipe.evaluation.measure if m != "cost"))
        results.append(
            measure(str(tuned), TUNED, evaluation, {"removed, %": cost["removed, %"]}, {"recovery": training})
        )
    if not keep_models:
        shutil.rmtree(slim, ignore_errors=True)
        shutil.rmtree(tuned, ignore_errors=True)
    return results


def _read_finished(file: Path, request: str) -> list[Result] | None:
    """The results of a finished row; ``None`` if it has none for this request."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return [Result(**result) for result in values["results"]] if values["request"] == request else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _request(recipe: Recipe, row: RecipeRow, device: str) -> str:
    """SHA-256 of the settings and versions that determine a row's figures."""
    installed = versions(as_device(device))
    values = [asdict(row), asdict(recipe.evaluation), recipe.dtype, installed["slimgpt"], installed["device"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def slug(name: str) -> str:
    """A row's name as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("%", "pct")).strip("-")
