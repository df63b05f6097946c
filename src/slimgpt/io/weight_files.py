"""The safetensors files of a folder that are the model: the same for every command, and the same as transformers
takes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from slimgpt.errors import ModelError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

READ_IF_THERE = (
    *("config.json", "slimgpt.json", "hf_quant_config.json", "generation_config.json"),
    *("adapter_config.json", "adapter_model.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "chat_template.jinja", "chat_template.json"),
)
"""Files beside the weights that change what is read from a folder."""

NARROW = ("F8", "F6", "F4")
"""How safetensors' names of floating-point types begin that mean nothing without scales."""


def check_regular(files: Iterable[Path]) -> None:
    """Refuse pipes, devices, folders and links that lead nowhere where files of a model are read.

    Libraries take such a thing for a file that is not there, and read the next best in its place.

    Args:
        files: of which some need not be there.

    Raises:
        ModelError: one is no file.
    """
    for file in files:
        if os.path.lexists(file) and not file.is_file():
            raise ModelError(f"{file} is no regular file, or a link that leads nowhere; put the file itself there")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that ``from_pretrained`` reads: the single file, or else the shards that the index names.

    Others in the folder (``consolidated.safetensors``, old shards beside a newer single file) are not the model.

    Raises:
        ModelError: there is none, or the index is damaged or names a file outside the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    check_regular((folder / SINGLE_FILE, index))
    if not index.is_file():
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        beside = f"; it holds {others[0]}, which transformers does not take for the model" if others else ""
        raise ModelError(
            f"{folder} holds no {SINGLE_FILE} and no {INDEX_FILE}{beside}. Pickled weights are never read: convert "
            "them with transformers' save_pretrained first"
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = content["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is no index of safetensors files: {type(error).__name__}: {error}") from error
    if not isinstance(content.get("metadata"), dict):
        raise ModelError(
            f'{index} has no object "metadata", without which transformers does not read it; add "metadata": {{}}'
        )
    if not names or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{index} names no files; fetch it again")
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ModelError(f"{index} names {name}, which lies outside the folder; only files inside it are read")
        try:
            is_file = (folder / name).is_file()
        except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
            raise ModelError(
                f"{index} names {name:.60}..., and no file can be called so: {error.__class__.__name__}; fetch it again"
            ) from error
        check_regular([folder / name])
        if not is_file:
            raise ModelError(f"{folder} lacks {name}, which its index names; fetch it, or delete the index")
    return [folder / name for name in names]


def check_files(files: list[Path], narrow: bool = False) -> None:
    """Open the header of every file before anything long begins.

    Args:
        narrow: whether tensors may be of floating-point numbers of 8 bits and less: a config says how to read them.

    Raises:
        ModelError: one cannot be read, a tensor is in two of them, or one is of 8-bit floating-point numbers that no
            config explains.
    """
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                names = list(handle.keys())
                types = {name: handle.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is no readable safetensors file (corrupt, encrypted or cut short): {error}"
            ) from error
        for name, kind in types.items():
            if kind.startswith(NARROW) and not narrow:
                raise ModelError(
                    f"{file} holds {name} in {kind}, and neither quantization_config in config.json nor a "
                    "hf_quant_config.json tells its scales; fetch the JSON files that belong to it"
                )
            if name in where:
                raise ModelError(
                    f"{name} is in {where[name].name} and in {file.name}; which one is meant cannot be told: remove one"
                )
            where[name] = file


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that are the model."""
    return sum(file.stat().st_size for file in weight_files(folder))
