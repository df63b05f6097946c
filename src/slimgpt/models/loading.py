"""Bring a model in: a hub id, a folder, a GGUF file or the demo. No pickle is read and no remote code runs unasked."""

from __future__ import annotations

import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from slimgpt.errors import ModelError, UnsupportedFamilyError, one_line
from slimgpt.io.tensors import align
from slimgpt.models.adapters import merge, trained_ties
from slimgpt.models.build import architecture_of, empty_model, slim_class, stock_class
from slimgpt.models.config_files import GENERATION_FILE, check_config_files, read_generation_config
from slimgpt.models.families import ARCHITECTURES, MULTIMODAL
from slimgpt.models.families.unknown import HELP
from slimgpt.models.gguf_file import check_file, restore_biases, restore_positions, unread_tensors
from slimgpt.models.language_model_config import check_language_model, check_layout, is_tied_by_default_alone
from slimgpt.models.lookup import is_slim
from slimgpt.models.quantization import strip_quantization
from slimgpt.models.remote_code import AUTO_MODEL, register_model_class
from slimgpt.models.source import Source, check_files, has_weights, locate, weights_folder
from slimgpt.models.streaming import WeightFiles, stored_dtype, untie_as_stored
from slimgpt.models.ties import is_tied, untie, untie_as_held
from slimgpt.models.unknown_tensors import refuse_unknown, unknown_tensors
from slimgpt.models.weight_conversion import ConvertedFiles
from slimgpt.runtime.devices import as_device, as_dtype

SAME_AS = {"kimi_k2": "deepseek_v3", "mimo": "qwen2"}
"""Types that repositories have given names of their own to, by what transformers calls the same architecture."""

CONVERTIBLE = ("baichuan", "internlm2")
"""Types whose layout :mod:`slimgpt.checkpoint.convert` knows."""

SENTENCEPIECE_FILE = "tokenizer.model"
SENTENCEPIECE_MODULES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
"""What turns such a file into a fast tokenizer: the names for pip, and those for Python."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_config(source: Source, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config alone, untied where the files of a local folder, or the adapter, have an output head of their own.

    Raises:
        ModelError: it cannot be found or read, is quantised in a way that cannot be read, needs remote code, or is a
            GGUF file whose positions no config has; or its files cannot be read.
    """
    gguf = Path(source.location) / source.gguf_file if source.gguf_file else None
    if gguf is not None:
        check_file(gguf)
    refuse_remote_code(source, trust_remote_code)
    if source.folder is not None:  # before transformers looks at it; of a hub id, once that is known to be there
        _refuse_unreadable(source)
    try:
        config = _read_config(source, trust_remote_code)
    except Exception as error:  # whatever a value in the file made of it
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{source.name} needs Python code from its own repository; read it, then pass --trust-remote-code"
            ) from error
        nowhere = "" if source.folder is not None else f"there is no folder {source.location} here, and from the hub: "
        raise ModelError(f"cannot read the model '{source.name}': {nowhere}{one_line(error)}") from error
    check_language_model(config, source)
    if gguf is not None:
        restore_positions(gguf, config)
        restore_biases(gguf, config)
    if not source.gguf_file:
        _refuse_unreadable(source)
        strip_quantization(config)
    if is_tied(config) and not source.gguf_file:
        _untie_if_needed(config, source)
    return config


def _read_config(source: Source, trust_remote_code: bool) -> PreTrainedConfig:
    """The config by the class of transformers where it has one, whatever code of its own the repository brings."""
    raw: dict[str, Any] = {}
    if not source.gguf_file:
        raw, _ = PreTrainedConfig.get_config_dict(source.location, **source.arguments)
    model_type = str(raw.get("model_type"))
    if model_type not in SAME_AS:
        trust = trust_remote_code and model_type not in CONFIG_MAPPING
        config = AutoConfig.from_pretrained(source.location, trust_remote_code=trust, **source.arguments)
        register_model_class(config, source.location)
        check_layout(config, raw, source)
        return config
    other = SAME_AS[model_type]
    warnings.warn(f"{source.name} is a {model_type}, which transformers has, and saves, as {other}", stacklevel=4)
    values = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map", "architectures")}
    return AutoConfig.for_model(other, **values)


def _refuse_unreadable(source: Source) -> None:
    """Refuse a model that is quantised in a way that cannot be read: reading how raises it."""
    _ = source.quantization


def _untie_if_needed(config: PreTrainedConfig, source: Source) -> None:
    """Untie the config of a model whose head is a matrix of its own, whatever its config.json says."""
    stored = source.folder is not None and has_weights(source.folder)
    if not stored and source.adapter is None:
        if source.folder is not None and is_tied_by_default_alone(config, source.folder):
            untie(config)
        return
    try:
        model = empty_model(config)
    except UnsupportedFamilyError:  # whoever builds the model says so
        return
    if stored and untie_as_stored(config, model, ConvertedFiles(source.folder, model)):  # type: ignore[arg-type]
        return
    if source.adapter is not None and (trained := trained_ties(model, source.adapter)):
        untie(config)
        warnings.warn(
            f"{source.adapter} trains {trained[0]}, which {source.location} ties to another matrix; the merged model "
            "is untied",
            stacklevel=3,
        )


def refuse_remote_code(source: Source, trust_remote_code: bool) -> None:
    """Say early that a folder's own Python code would be needed.

    Raises:
        ModelError: its family is none that transformers knows, and the user has not allowed the code; or one of its
            JSON files is damaged.
    """
    if source.folder is None or source.gguf_file:
        return
    raw = check_config_files(source.folder)
    known = (*ARCHITECTURES, *MULTIMODAL, *CONFIG_MAPPING, *SAME_AS)
    if not trust_remote_code and "auto_map" in raw and raw["model_type"] not in known:
        kind = f"{source.name} (model_type '{raw['model_type']}') comes with Python code of its own"
        if isinstance(raw["auto_map"], dict) and AUTO_MODEL not in raw["auto_map"]:
            raise ModelError(f"{kind}, and its auto_map names no {AUTO_MODEL}, so there is nothing to prune")
        convert = f"; `slimgpt convert {source.location} OUT` writes it as Llama without its code"
        raise ModelError(
            f"{kind} ({raw['auto_map']}); no such code runs unless you read it and pass --trust-remote-code, and a "
            f"layout that is not in `slimgpt families` must be described first ({HELP})"
            f"{convert if raw['model_type'] in CONVERTIBLE else ''}"
        )


def load_tokenizer(source: Source, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ModelError: there is none or it cannot be read.
    """
    location = source.location
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").is_file():
        location = str(source.adapter)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code, **source.arguments)
    except Exception as error:
        reason = one_line(error)
        folder = Path(location)
        names = {file.name for file in folder.iterdir()} if folder.is_dir() and not source.gguf_file else None
        if names is not None and names.isdisjoint(TOKENIZER_FILES):
            reason = f"{location} has none of {', '.join(TOKENIZER_FILES)}"
        elif (lacking := _lacking_modules(folder)) is not None:
            reason = lacking
        raise ModelError(f"cannot read the tokenizer of '{source.name}': {reason}") from error
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise ModelError(
            f"cannot read the tokenizer of '{source.name}': model_max_length is {tokenizer.model_max_length!r:.60}; it "
            "must be a number. Correct tokenizer_config.json, or fetch it again"
        )
    return tokenizer


def _lacking_modules(folder: Path) -> str | None:
    """Packages to install for a SentencePiece model without a ``tokenizer.json``; ``None`` if nothing is missing.

    transformers itself asks for tiktoken there.
    """
    if not (folder / SENTENCEPIECE_FILE).is_file() or (folder / "tokenizer.json").is_file():
        return None
    lacking = [name for name, module in SENTENCEPIECE_MODULES.items() if not _installed(module)]
    if not lacking:
        return None
    return (
        f"{folder} has {SENTENCEPIECE_FILE} and no tokenizer.json; to read it: pip install {' '.join(lacking)}, or "
        "save the tokenizer as tokenizer.json where these are installed"
    )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in is not there
        return False


def load_model(
    source: Source,
    config: PreTrainedConfig,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The weights, on ``device``, in evaluation mode.

    Args:
        config: what :func:`load_config` gave.
        dtype: ``auto`` (as stored; float32 for GGUF), ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        UnsupportedFamilyError: the family is not in the table.
        ModelError: a file is corrupt or encrypted, weights are missing or of other shapes, there are more than the
            model has, or there are only pickled ones.
    """
    if source.adapter is not None:  # what is merged may be untied; the base is loaded as its own files say
        config = load_config(replace(source, adapter=None), trust_remote_code)
    torch_dtype = as_dtype(dtype)
    quantization = source.quantization
    if torch_dtype == "auto" and (source.gguf_file or quantization is not None):
        torch_dtype = stored_dtype(source, config, "auto")
    architecture = architecture_of(config)
    check_files(source)
    base = stock_class(config)
    if is_slim(config):
        base = slim_class(base, config, architecture)
    arguments: dict[str, Any] = dict(source.arguments) if source.gguf_file else {"use_safetensors": True}
    location: str | None = source.location
    folder = weights_folder(source) if quantization is not None else None
    if folder is not None:  # transformers is given the tensors, as our reader has them
        assert isinstance(torch_dtype, torch.dtype)
        location, arguments = None, {"state_dict": WeightFiles(folder, torch_dtype).slices()}
    try:
        model, info = base.from_pretrained(  # type: ignore[misc]
            location,
            config=config,
            dtype=torch_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=trust_remote_code,
            # A full model is the model: where an adapter lies beside it, transformers would put that on top.
            adapter_kwargs={"subfolder": "no-adapter"},
            **arguments,
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        hint = "; is the file whole?" if source.gguf_file else ""
        raise ModelError(f"cannot load the weights of '{source.name}': {one_line(error)}{hint}") from error
    mismatched: Any = info.get("mismatched_keys") or ()
    if mismatched:
        name, stored, expected = min(mismatched)
        raise ModelError(
            f"cannot load the weights of '{source.name}': {name} is {tuple(stored)} in the files and {tuple(expected)} "
            "by the config"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"{source.name} lacks {len(missing)} weights, the first is {missing[0]}; "
            "transformers would fill them with random numbers"
        )
    refuse_unknown(source.name, unknown_tensors(model, info.get("unexpected_keys") or ()))
    if source.gguf_file:
        refuse_unknown(source.name, unread_tensors(Path(source.location) / source.gguf_file, model))
    untie_as_held(model)  # a hub id, whose files could not be looked at before
    model.config.name_or_path = source.name  # what reports and cards say, rather than a path of this machine
    if source.adapter is not None:
        model = merge(model, source.adapter)  # type: ignore[assignment]
    if folder is not None and quantization is not None:
        if (folder / GENERATION_FILE).is_file():
            model.generation_config = read_generation_config(folder)
        # For the report of a run in memory.
        model.dequantized_from = quantization.to_json(model.dtype)  # type: ignore[assignment]
    # A GGUF file is de-quantised on the way in; with the mark left on, the model could not be saved.
    for holder in (model.config, model):
        for mark in ("quantization_config", "hf_quantizer", "quantization_method", "is_quantized"):
            holder.__dict__.pop(mark, None)
    if source.gguf_file:  # NumPy's memory, which begins elsewhere in every process
        align(model)
    return model.to(device).eval()  # type: ignore[arg-type]


def load(
    name: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, dense or slim; slim folders need no ``trust_remote_code``.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``demo`` (SmolLM2-135M-Instruct from PyPI).
        dtype: ``auto`` (as stored; float32 for GGUF), ``float32``, ``float16`` or ``bfloat16``.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` or ``auto``.
        trust_remote_code: let the tokenizer and the config run Python code from the model's repository.

    Raises:
        ModelError: the model cannot be found, read, or supported.
        UsageError: an unknown dtype or device.
    """
    as_dtype(dtype)
    target = as_device(device)
    source = locate(name)
    config = load_config(source, trust_remote_code)
    model = load_model(source, config, dtype, target, trust_remote_code)
    return model, load_tokenizer(source, trust_remote_code)


__all__ = ["Source", "UnsupportedFamilyError", "as_device", "as_dtype", "load", "load_config", "load_model", "locate"]
