"""The plan of a run, and the times that it is made with where a speed is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from slimgpt.checkpoint.journal import JOURNAL_FILE, unfinished_folder
from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.config import PruneConfig
from slimgpt.errors import PlanError, UsageError
from slimgpt.evaluation.layer_times import OnTimed, measure_table
from slimgpt.evaluation.reached_speed import reached_speed
from slimgpt.io.atomic import write_file
from slimgpt.models.parameter_counts import ModelShape, describe
from slimgpt.planning.alignment import preferred_step
from slimgpt.planning.plan import Plan
from slimgpt.planning.planner import check_heads, plan_for
from slimgpt.planning.speed_plan import check_timeable, chosen_head_unit, plan_for_speed
from slimgpt.planning.speed_table import (
    PROTOCOL,
    SpeedTable,
    SpeedTarget,
    mismatch,
    other_machine,
    read_table,
    table_model,
)
from slimgpt.runtime.distributed import in_torchrun
from slimgpt.runtime.versions import timed_machine

TIMING, TIMING_RESULT = "timing layers", "timing the result"
"""Names of the phases, as callbacks are told of them."""


def planned(
    model_config: Any,
    config: PruneConfig,
    shape: ModelShape,
    stored: torch.dtype,
    device: torch.device,
    *,
    table: SpeedTable | None = None,
    on_timed: OnTimed | None = None,
    keep_table: bool = True,
) -> tuple[Plan, SpeedTarget | None]:
    """The widths that the settings ask for, and the target in speed if they name one.

    Layers are timed where neither a table nor the file of one is there.

    Args:
        stored: the type of the weights.
        table: times that an earlier part of the run has measured; used if they serve for these settings.
        on_timed: called after every timing.
        keep_table: whether times that are measured here are written to the file that the settings name.

    Raises:
        PlanError: no widths can do what was asked for, or the table is for something else.
        UsageError: the engine is not timed here and no table is given, or several processes would time each other.
    """
    if config.speedup is None:
        return plan_for(model_config, config, shape, stored), None
    whole = describe(model_config)  # with what these settings keep, so that a table serves for others, too
    table = known_table(model_config, config, table)
    if table is None:
        table = measure_table(
            model_config,
            whole,
            chosen_head_unit(config, whole),
            preferred_step(config, whole),
            batch=config.batch,
            prompt=config.prompt,
            new_tokens=config.new_tokens,
            device=device,
            dtype=stored,
            on_timed=on_timed,
        )
        if config.speed_table is not None and keep_table:
            write_file(Path(config.speed_table).expanduser(), json.dumps(table.to_json(), indent=1) + "\n")
    target = SpeedTarget(table, config.speedup, other_machine(table, timed_machine(device, stored)))
    return plan_for_speed(model_config, config, shape, target), target


def known_table(model_config: Any, config: PruneConfig, table: SpeedTable | None = None) -> SpeedTable | None:
    """The times that are there for a target in speed; ``None`` where layers have to be timed, and can be.

    Args:
        table: times that an earlier part of the run has measured; taken if they serve for these settings.

    Raises:
        PlanError: the model cannot be timed, or the table of the file is for something else.
        UsageError: there is no table, and the times cannot be measured here.
    """
    shape = describe(model_config)
    check_heads(model_config, shape, config.head_unit)
    check_timeable(model_config, shape)
    if table is not None and _unfit(table, model_config, config, shape) is None:
        return table
    file = Path(config.speed_table).expanduser() if config.speed_table is not None else None
    if file is not None and file.exists():
        table = read_table(file)
        if (problem := _unfit(table, model_config, config, shape)) is not None:
            raise PlanError(f"the speed table {file} does not serve: {problem}; give another file to measure anew")
        return table
    if config.on != "transformers":
        raise UsageError(
            f"on {config.on}: only transformers is timed here; give a speed_table with the times of layers in "
            f"{config.on}"
        )
    if in_torchrun():
        raise UsageError(
            "speedup: several processes would time each other; measure a speed_table with one (slimgpt plan --speedup "
            "--speed-table FILE), then give it to all"
        )
    if file is not None and not file.absolute().parent.is_dir():
        raise UsageError(f"{file.absolute().parent} is no folder; make it first, or give another place for speed_table")
    return None


def _unfit(table: SpeedTable, model_config: Any, config: PruneConfig, shape: ModelShape) -> str | None:
    protocol = {name: getattr(config, name) for name in PROTOCOL}
    layers = [layer.sizes for layer in shape.layers]
    return mismatch(table, table_model(model_config), chosen_head_unit(config, shape), protocol, layers=layers)


def kept_table(output: Path) -> SpeedTable | None:
    """The times of the unfinished run that will write a folder, or of the finished one, so that it gets the same plan;
    ``None`` if there are none."""
    for file, place in ((unfinished_folder(output) / JOURNAL_FILE, "speed_table"), (output / REPORT_FILE, "speed")):
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            values = json.loads(file.read_text(encoding="utf-8"))[place]
            return SpeedTable.from_json(values["table"] if place == "speed" else values)
    return None


def speed_promise(target: SpeedTarget, shape: ModelShape, plan: Plan) -> dict[str, Any]:
    """The speedup that was asked for, the one that the table promises, and what was timed for it."""
    table = target.table
    return {
        "asked": target.speedup,
        "promised": target.promised(shape, plan.layers),
        "engine": table.engine,
        "batch": table.batch,
        "prompt": table.prompt,
        "new_tokens": table.new_tokens,
        **({} if target.note is None else {"note": target.note}),
    }


def speed_report(
    target: SpeedTarget,
    model_config: Any,
    shape: ModelShape,
    plan: Plan,
    stored: torch.dtype,
    device: torch.device,
    on_timed: Callable[[str, int, int, float], None] | None = None,
) -> dict[str, Any]:
    """The entry of a target in speed in a report: promised, reached, and the times it was planned with.

    Args:
        model_config: the dense model's.
        plan: of the slim model.
        on_timed: called after every round with the phase, the round, the number of all and the seconds it took.
    """
    table = target.table
    report = {**speed_promise(target, shape, plan), "reached": None}
    if table.engine != "transformers":
        report["not_timed"] = f"{table.engine} is not timed here"
    else:
        report |= reached_speed(
            model_config,
            [layer.sizes for layer in shape.layers],
            plan.layers,
            batch=table.batch,
            prompt=table.prompt,
            new_tokens=table.new_tokens,
            device=device,
            dtype=stored,
            parameters=plan.parameters + plan.parameters_before,
            on_timed=None if on_timed is None else lambda *step: on_timed(TIMING_RESULT, *step),
        )
    return {**report, "table": table.to_json()}
