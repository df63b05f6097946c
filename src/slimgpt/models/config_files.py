"""The JSON files beside the weights, read before transformers reads them: what is damaged is said in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from slimgpt.errors import ModelError, one_line
from slimgpt.runtime.devices import DTYPES

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
SIDE_FILES = (GENERATION_FILE, "tokenizer_config.json", "special_tokens_map.json")

DEEPEST = 64
"""Levels of lists and objects within each other; configs have five at most."""

LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2_000),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "vocab_size", "head_dim"), 1 << 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), 1 << 20),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1 << 40),
}
"""Sizes in a config that are one whole number each, and what no model comes near."""

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts")
"""Sizes that may be 0."""

MOST_EXPERTS = 100_000


def read_object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that holds one object.

    Raises:
        ModelError: it is no regular file, no JSON or no object; it is nested without measure, or has half of a
            surrogate pair in a text, which no UTF-8 file can hold.
    """
    if not file.is_file():
        raise ModelError(f"{file} is no regular file; fetch it again")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read: {one_line(error)}; it must be JSON in UTF-8: fetch it again"
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no settings but a {type(content).__name__}; fetch it again")
    for depth, key, value in _walk(content):
        if depth > DEEPEST:
            raise ModelError(f"{file} is nested more than {DEEPEST} levels deep; fetch it again")
        for text in (key, value):
            if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
                raise ModelError(
                    f"{file}: {key!a} has half of a surrogate pair, which is no character; correct the text there, or "
                    "fetch the file again"
                )
    return content


def _walk(content: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Every value in nested objects and lists, with its depth and the key that it belongs to."""
    todo: list[tuple[int, str, Any]] = [(1, "", content)]
    while todo:
        depth, key, value = todo.pop()
        yield depth, key, value
        if isinstance(value, dict):
            todo += [(depth + 1, name, inner) for name, inner in value.items()]
        elif isinstance(value, list):
            todo += [(depth + 1, key, inner) for inner in value]


def check_config_files(folder: Path) -> dict[str, Any]:
    """Look at the config of a model folder, and at the files beside it that transformers reads too; its content.

    Raises:
        ModelError: one is damaged, or the config has a size that no model has.
    """
    config_file = folder / CONFIG_FILE
    config = read_object(config_file)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{config_file} does not name a model_type")
    for _, key, value in _walk(config):
        _check_size(config_file, key, value)
    text_part = config.get("text_config")
    for part in (config, text_part if isinstance(text_part, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            _check_dtype(config_file, key, part.get(key))
    for name in SIDE_FILES:
        if (folder / name).is_file():
            read_object(folder / name)
    if (folder / GENERATION_FILE).is_file():
        read_generation_config(folder)
    return config


def _check_size(file: Path, key: str, value: Any) -> None:
    least, most = (0, MOST_EXPERTS) if key in COUNTS else (1, LIMITS.get(key))
    if most is None or value is None or isinstance(value, (list, dict)):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ModelError(
            f"{file}: {key} is {value!r:.60}; it must be a whole number from {least} to {most:,}. Correct it, or "
            "fetch the file again"
        )


def _check_dtype(file: Path, key: str, value: Any) -> None:
    dtype = getattr(torch, value, None) if isinstance(value, str) else None
    narrow = not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2
    if value is not None and narrow:
        raise ModelError(
            f"{file}: {key} is {value!r:.60}; it must be one of {', '.join(DTYPES)}, or be left out: then the weights "
            "are taken as they are stored"
        )


def read_generation_config(folder: Path) -> GenerationConfig:
    """The settings for generation of a model folder: from their own file, or, as older folders have them, from the
    model's config.

    Raises:
        ModelError: the file holds values that transformers does not take.
    """
    old = not (folder / GENERATION_FILE).is_file()
    name = CONFIG_FILE if old else GENERATION_FILE
    try:
        return GenerationConfig.from_pretrained(folder, config_file_name=name, _from_model_config=old)
    except Exception as error:
        raise ModelError(
            f"{folder / name} cannot be read: {one_line(error)}; correct it, or delete it: it is not needed"
        ) from error
