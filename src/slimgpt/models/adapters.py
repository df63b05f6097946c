"""LoRA adapter folders, as peft writes them: merged into the model that they were trained for."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from slimgpt.errors import ModelError, one_line
from slimgpt.io.weight_files import INDEX_FILE, SINGLE_FILE
from slimgpt.models.ties import untie_weights

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


FULL_MODEL = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no full weights, with a config.json or without."""
    return (folder / CONFIG_FILE).is_file() and not any((folder / name).is_file() for name in FULL_MODEL)


def base_of(folder: Path) -> str:
    """The name of the model that an adapter belongs to.

    Raises:
        ModelError: it cannot be merged: no LoRA, pickled weights, no base named, or peft is not installed.
    """
    config = _settings(folder)
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


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / CONFIG_FILE} holds no settings but a {type(settings).__name__}; save it anew")
    return settings


def trained_ties(model: PreTrainedModel, folder: Path) -> list[str]:
    """The modules of a tied model, head and embedding, that an adapter trains; each as if it were a matrix of its own.

    Raises:
        ModelError: the adapter's file cannot be read, or it says that what it trains is to stay tied.
    """
    settings = _settings(folder)
    whole = settings.get("modules_to_save") or ()
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as handle:
            names = list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} is no readable safetensors file: {one_line(error)}") from error
    ties = model.all_tied_weights_keys or {}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in (*ties.keys(), *ties.values()))
    trained = [
        module
        for module in modules
        if module in whole
        or module.rpartition(".")[2] in whole
        or any(name.startswith(f"base_model.model.{module}.lora_") for name in names)
    ]
    for setting in ("ensure_weight_tying", "trainable_token_indices"):
        if trained and settings.get(setting):
            raise ModelError(
                f"{folder / CONFIG_FILE} trains {trained[0]} of a model with tied embeddings and sets {setting}; the "
                "two cannot be merged into one matrix without changing what was trained. Merge the adapter with peft "
                "and give the merged folder, or train it without that setting"
            )
    return trained


def merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter's product added to its weights; untied if head or embedding are among them.

    Raises:
        ModelError: the adapter does not fit the model, or it has tensors for modules that the model lacks.
    """
    from peft import PeftModel

    if trained_ties(model, folder):
        untie_weights(model)  # else what is added to the one would be added to the other
    base = model.config.name_or_path
    try:
        adapted = PeftModel.from_pretrained(model, str(folder))
        # The first time peft keeps to itself which tensors found no place.
        result = adapted.load_adapter(str(folder), "default")
        for lacking, names in (("the model", result.unexpected_keys), (WEIGHTS_FILE, result.missing_keys)):
            if names:
                raise ModelError(
                    f"the adapter {folder} does not fit {base}: {lacking} lacks {len(names)} of its tensors, the first "
                    f"is {min(names)}; name the model that it was trained for in {CONFIG_FILE}"
                )
        return adapted.merge_and_unload()  # type: ignore[return-value]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"the adapter {folder} does not fit {base}: {one_line(error)}") from error
