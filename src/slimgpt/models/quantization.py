"""Quantisation of a checkpoint, by its JSON files, and whether it can be undone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from slimgpt.errors import ModelError
from slimgpt.models.config_files import CONFIG_FILE, read_object
from slimgpt.runtime.devices import dtype_name

MODELOPT_FILE = "hf_quant_config.json"
"""Where NVIDIA's Model-Optimizer says what it did; its older versions leave config.json as it was."""

CONFIG_KEYS = ("quantization_config", "compression_config")

MLX_KEY = "quantization"
"""Where mlx-lm says what it did; newer versions do so in ``quantization_config`` as well."""
MLX_WAY_OUT = (
    "`mlx_lm.convert --hf-path MODEL --mlx-path OUT --dequantize --dtype bfloat16` (pip install 'mlx[cpu]' mlx-lm)"
)

SCALED_FORMATS = ("dense", "naive-quantized", "float-quantized", "int-quantized")
"""Formats of compressed-tensors that are numbers of 8 bits with scales beside them."""
PACKED_FORMATS = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Those whose numbers are packed: its own library unpacks them."""

MODELOPT_ALGORITHMS = (None, "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "MIXED_PRECISION")
"""Of Model-Optimizer, those whose tensors say by themselves what they are; none: only the KV cache is quantised."""

SUPPORTED = (
    "fp8, mxfp8, fbgemm_fp8, mxfp4, modelopt (FP8, NVFP4), compressed-tensors, awq and bitsandbytes are read, and GGUF "
    "files"
)
WAY_OUT = (
    "Give the checkpoint in 16 bits that it was made from; or write it out with llama.cpp's `python "
    "convert_hf_to_gguf.py MODEL --outtype bf16 --outfile model.gguf`, which de-quantises what it knows (gptq among "
    "it), and prune model.gguf"
)


@dataclass(frozen=True)
class Quantization:
    """Format and bits of a quantised checkpoint.

    Args:
        method: ``quant_method`` in its config; ``modelopt`` for a folder with ``hf_quant_config.json``.
        format: the same for people.
        block: rows and columns of a matrix that share a scale; ``None``: a scale for the tensor, or one for each row.
        settings: all that the files say of it.
    """

    method: str
    format: str
    block: tuple[int, int] | None
    settings: Mapping[str, Any]

    def to_json(self, dtype: torch.dtype) -> dict[str, str]:
        """Its entry in a report.

        Args:
            dtype: what the weights were read as.
        """
        read_as = dtype_name(dtype)
        return {"quant_method": self.method, "format": self.format, "read_as": read_as}

    def check_library(self, where: str) -> None:
        """Refuse weights that only a library unpacks which is not installed; a plan needs none.

        Args:
            where: the folder, for messages.

        Raises:
            ModelError: with its name.
        """
        packed = any(form in PACKED_FORMATS for form in self.format.split(", "))
        library = {"bitsandbytes": "bitsandbytes", "awq": "compressed_tensors"}.get(self.method)
        if packed and self.method == "compressed-tensors":
            library = "compressed_tensors"
        if library is not None and find_spec(library) is None:
            raise ModelError(
                f"{where} is quantised ({self.format}), and {library.replace('_', '-')}, which unpacks it, is not "
                "installed: pip install 'slimgpt[quantized]'"
            )

    def group(self, module: str) -> Mapping[str, Any]:
        """The one of compressed-tensors' groups that a module of the files belongs to.

        Patterns come before classes of modules, of which a file knows nothing.
        """
        groups = list(self.settings["config_groups"].values())
        for group in groups:
            for target in group.get("targets") or ():
                pattern = target.removeprefix("re:")
                if re.match(pattern, module) if pattern != target else target == module:
                    return group
        classes = (g for g in groups if any("." not in t and ":" not in t for t in g.get("targets") or ()))
        return next(classes, groups[0])


def folder_quantization(folder: Path) -> Quantization | None:
    """Quantisation of the checkpoint in a folder; ``None`` if it has none, or no config.json.

    Raises:
        ModelError: its numbers cannot be had back; or one of the JSON files is damaged.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    beside = read_object(folder / MODELOPT_FILE) if (folder / MODELOPT_FILE).is_file() else None
    return quantization_of(folder.name, read_object(folder / CONFIG_FILE), beside)


def location_quantization(name: str, location: str) -> Quantization | None:
    """The same of a local folder or a hub id.

    Args:
        name: of the model, for messages.
    """
    if Path(location).is_dir():
        return folder_quantization(Path(location))
    files = []
    for file in (CONFIG_FILE, MODELOPT_FILE):
        path = cached_file(
            location,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        files.append(None if path is None else read_object(Path(path)))
    return None if files[0] is None else quantization_of(name, files[0], files[1])


def strip_quantization(config: PreTrainedConfig) -> None:
    """Take the mark of quantisation from a config: what is read has none, and is saved without."""
    for part in (config, config.get_text_config(decoder=True)):
        for key in (*CONFIG_KEYS, "_pre_quantization_dtype"):
            part.__dict__.pop(key, None)


def quantization_of(name: str, config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> Quantization | None:
    """Quantisation of a checkpoint.

    Args:
        name: of the model, for messages.
        config: the content of config.json.
        beside: the content of ``hf_quant_config.json``.

    Raises:
        ModelError: its numbers cannot be had back.
    """
    text = config.get("text_config")
    holders = (config, text) if isinstance(text, Mapping) else (config,)
    settings = next((part[key] for part in holders for key in CONFIG_KEYS if part.get(key)), None)
    if settings is None and isinstance(config.get(MLX_KEY), Mapping):
        settings = config[MLX_KEY]
    if settings is None and beside is not None:
        settings = beside.get("quantization")
        if not isinstance(settings, Mapping):
            raise ModelError(f'{name}: {MODELOPT_FILE} has no object "quantization"; fetch the file again')
        settings = {**settings, "quant_method": "modelopt"}
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ModelError(f"{name}: quantization_config is {settings!r:.60}; it must be an object: fetch the file again")
    method = _method(settings)
    if method is None and {"group_size", "bits"} <= set(settings):
        raise ModelError(
            f"{name} is quantised (MLX, {settings['bits']} bits), which is not read: {SUPPORTED}. Give the checkpoint "
            f"in 16 bits that it was made from, or write it so: {MLX_WAY_OUT}"
        )
    if method is None:
        keys = ", ".join(map(str, settings)) or "nothing"
        raise ModelError(
            f"{name} is quantised, and its quantization_config names no quant_method (it has {keys}); {SUPPORTED}. "
            "Write the method there if you know it"
        )
    if method in ("fp8", "mxfp8"):
        block = _block(name, settings.get("weight_block_size") or ([1, 32] if method == "mxfp8" else None))
        where = f"in blocks of {block[0]} x {block[1]}" if block else "with a scale for each tensor"
        return Quantization(method, f"{method.upper()} {where}", block, settings)
    if method == "compressed-tensors":
        return _compressed(name, settings)
    if method == "modelopt":
        algorithm = settings.get("quant_algo")
        if algorithm not in MODELOPT_ALGORITHMS:
            raise _refusal(name, f"modelopt, {algorithm}")
        return Quantization(method, f"NVIDIA Model-Optimizer, {algorithm or 'KV cache'}", None, settings)
    if method in _TEXTS:
        return Quantization(method, _TEXTS[method], None, settings)
    raise _refusal(name, method)


_TEXTS = {
    "mxfp4": "MXFP4",
    "fbgemm_fp8": "FP8 with a scale for each row",
    "awq": "AWQ, 4 bits",
    "bitsandbytes": "bitsandbytes",
}


def _method(settings: Mapping[str, Any]) -> str | None:
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and isinstance(settings.get("config_groups"), Mapping):
        return "compressed-tensors"
    if method is None and "quant_algo" in settings:
        return "modelopt"
    return None if method is None else "modelopt" if str(method).startswith("modelopt") else str(method)


def _refusal(name: str, method: str) -> ModelError:
    return ModelError(f"{name} is quantised ({method}), which is not read: {SUPPORTED}. {WAY_OUT}")


def _block(name: str, sizes: Any) -> tuple[int, int] | None:
    if sizes is None:
        return None
    if isinstance(sizes, str):  # "128x128", as compressed-tensors once had it
        sizes = [int(part) if part.isdigit() else part for part in sizes.split("x")]
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 2 or not all(type(s) is int and s > 0 for s in sizes):
        raise ModelError(f"{name}: weight_block_size is {sizes!r:.60}; it must be two whole numbers above 0")
    return sizes[0], sizes[1]


def _compressed(name: str, settings: Mapping[str, Any]) -> Quantization:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ModelError(f"{name}: its quantization_config has no config_groups; fetch the config again")
    for group in groups.values():
        _check_group(name, group)
    sparsity = settings.get("sparsity_config")
    formats = {group.get("format") or settings.get("format") for group in groups.values()}
    if isinstance(sparsity, Mapping):
        formats.add(sparsity.get("format") or "dense")
    for form in sorted(map(str, formats)):
        if form not in (*SCALED_FORMATS, *PACKED_FORMATS):
            raise _refusal(name, f"compressed-tensors, {form}")
    return Quantization(
        "compressed-tensors", f"compressed-tensors, {', '.join(sorted(map(str, formats)))}", None, settings
    )


def _check_group(name: str, group: Mapping[str, Any]) -> None:
    targets = group.get("targets")
    sound = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    if not sound or not isinstance(group.get("weights") or {}, Mapping):
        raise ModelError(f"{name}: a group in its config_groups has no targets, or weights that are no object")
    for target in targets or ():
        try:
            re.compile(target.removeprefix("re:"))
        except re.error as error:
            raise ModelError(f"{name}: {target!r:.60} in config_groups is no pattern: {error}") from error
    group_block(name, group)


def group_block(name: str, group: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a group of compressed-tensors' config; ``None`` as in ``Quantization``."""
    weights = group.get("weights") or {}
    if weights.get("strategy") == "block":
        return _block(name, weights.get("block_structure"))
    if weights.get("strategy") in ("group", "tensor_group"):
        return _block(name, [1, weights.get("group_size")])
    return None
