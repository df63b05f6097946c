"""LoRA adapter folders, as peft writes them: merged into the model that they were trained for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from slimgpt.errors import ModelError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The name of the model that an adapter belongs to.

    Raises:
        ModelError: it cannot be merged: no LoRA, pickled weights, no base named, or peft is not installed.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind != "LORA":
        raise ModelError(f"{folder} is an adapter of type {kind}; only LoRA can be merged into the weights")
    if not base:
        raise ModelError(f"{folder / CONFIG_FILE} names no base_model_name_or_path; write the base model's name there")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}; pickled adapters are never read: save it anew with peft")
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{folder} is a LoRA adapter, and peft is not installed: pip install 'slimgpt[recover]'")
    return str(base)


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter's product added to its weights.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()  # type: ignore[return-value]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {folder} does not fit {model.config.name_or_path}: {error}") from error
