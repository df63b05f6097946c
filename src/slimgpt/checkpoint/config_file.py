"""``config.json`` as transformers 5 writes it, with its values also where other readers look for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.models.config_files import CONFIG_FILE


def write_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write a model's ``config.json``.

    mlx-lm, transformers 4 and converters read rotary settings and the number type in their old places, and take their
    own default, without a word, where nothing is there.
    """
    config.save_pretrained(folder)
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    parts = [values, *(value for name, value in values.items() if name == "text_config" and isinstance(value, dict))]
    for part in parts:
        part.update(legacy_fields(part))
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def legacy_fields(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of older readers that follow from a config's values: ``rope_theta``, ``rope_scaling``,
    ``torch_dtype``.

    Where layer types have rotary settings of their own, only Gemma 3 had old names for them.
    """
    fields: dict[str, Any] = {}
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    elif isinstance(rope, dict) and values.get("model_type") == "gemma3_text":
        fields["rope_theta"] = rope["full_attention"]["rope_theta"]
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if isinstance(values.get("dtype"), str):
        fields["torch_dtype"] = values["dtype"]
    return fields
