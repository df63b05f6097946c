"""A plan as a TOML file that people can read and change."""

from __future__ import annotations

import tomllib
from pathlib import Path

from transformers import PreTrainedConfig

from slimgpt.errors import PlanError
from slimgpt.models.parameter_counts import ModelShape, describe
from slimgpt.planning.plan import Plan, plan_of_widths

PLAN_KEYS = ("model_type", "head_unit", "parameters", "parameters_before", "layers")


def to_toml(plan: Plan, model_type: str) -> str:
    """The plan as TOML; :func:`read_plan` reads it."""
    lines = [
        "# Widths of every decoder layer. `slimgpt prune --plan` follows them to the letter.",
        f'model_type = "{model_type}"',
        f'head_unit = "{plan.head_unit}"  # kv: whole KV heads; query: query heads, equally many per KV head',
        f"parameters = {plan.parameters}",
        f"parameters_before = {plan.parameters_before}",
        "layers = [",
        *(f"    {{ {', '.join(f'{field} = {value}' for field, value in layer.items())} }}," for layer in plan.layers),
        "]",
    ]
    return "\n".join(lines) + "\n"


def read_plan(file: str | Path, config: PreTrainedConfig, shape: ModelShape | None = None) -> Plan:
    """The plan of a file, checked against the model that it is for.

    Raises:
        PlanError: the file cannot be read, has unknown or missing keys, or does not fit the model.
    """
    if not Path(file).expanduser().is_file():
        raise PlanError(f"cannot read the plan {file}: it does not exist, or is no regular file")
    try:
        values = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"cannot read the plan {file}: {error}") from error
    unknown = [key for key in values if key not in PLAN_KEYS]
    if unknown:
        raise PlanError(f"{file}: unknown key '{unknown[0]}'; known are {', '.join(PLAN_KEYS)}")
    missing = [key for key in ("head_unit", "layers") if key not in values]
    if missing:
        raise PlanError(f"{file} lacks the key '{missing[0]}'")
    if values.get("model_type", config.model_type) != config.model_type:
        raise PlanError(f"{file} is a plan for '{values['model_type']}', and the model is '{config.model_type}'")
    layers = values["layers"]
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise PlanError(f"{file}: layers must be a list of tables, one per layer")
    shape = shape or describe(config)
    for index, layer in enumerate(layers):
        known = shape.layers[min(index, len(shape.layers) - 1)].sizes
        if sorted(layer) != sorted(known) or not all(type(value) is int for value in layer.values()):
            raise PlanError(f"{file}: layer {index} must give whole numbers for {', '.join(known)} and nothing else")
    plan = plan_of_widths(shape, [dict(layer) for layer in layers], str(values["head_unit"]))
    for key, value in (("parameters", plan.parameters), ("parameters_before", plan.parameters_before)):
        if values.get(key, value) != value:
            raise PlanError(f"{file} says {key} = {values[key]}, but these widths make {value}; correct or remove it")
    return plan
