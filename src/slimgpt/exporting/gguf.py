"""GGUF for llama.cpp, also where every layer has widths of its own."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimgpt.errors import ExportError, PlanError
from slimgpt.exporting.gguf_tokenizer import add_tokenizer
from slimgpt.exporting.source import ExportSource
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, is_uniform
from slimgpt.models.llama_cpp import installed
from slimgpt.models.lookup import head_dim
from slimgpt.planning.engines import gguf_architecture

OWN_TYPES = ("F32", "F16", "BF16", "Q8_0")
"""What gguf-py writes by itself; anything else goes through llama.cpp's quantiser."""

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def check(exported: ExportSource, quantize: str) -> None:
    """Refuse what cannot be written, before any work.

    Raises:
        ExportError: no architecture of llama.cpp fits, or a type of numbers that nothing here can make.
    """
    try:
        gguf_architecture(exported.config, exported.sizes)
    except PlanError as error:
        raise ExportError(f"{exported.source.name} cannot become a GGUF file: {error}") from None
    if quantize in OWN_TYPES:
        return
    known = [one.name.removeprefix("MOSTLY_") for one in LlamaFileType]
    if not any(name.startswith(quantize) for name in known):  # Q4_K is short for Q4_K_M
        near = get_close_matches(quantize, known, 3, 0.0)
        raise ExportError(f"--quantize {quantize} is no type of llama.cpp's; the nearest are {', '.join(near)}")
    if quantize not in _llama_types() and shutil.which("llama-quantize") is None:
        raise ExportError(
            f"--quantize {quantize} is written by llama.cpp's own quantiser, which is not here; install "
            f"llama-cpp-python, or put llama-quantize on the PATH, or choose {', '.join(OWN_TYPES)}"
        )


def write(exported: ExportSource, file: Path, quantize: str, pre: str | None = None) -> list[str]:
    """Write a GGUF file.

    Args:
        file: what to write; the caller gives it its final name.
        quantize: ``F32``, ``F16``, ``BF16``, ``Q8_0``, or a type of llama.cpp's quantiser.
        pre: see :func:`slimgpt.exporting.gguf_tokenizer.add_tokenizer`.

    Returns:
        Notes for the user, such as rows that could not take the type.
    """
    if quantize in OWN_TYPES:
        return _write(exported, file, quantize, pre)
    full = file.with_suffix(".full")
    notes = _write(exported, full, "F32", pre)
    try:
        _quantize(full, file, quantize)
    finally:
        full.unlink(missing_ok=True)
    if any(layer[CHANNELS] % 256 for layer in exported.sizes):
        notes.append("rows that are no multiple of 256 numbers took a larger type; --round-to 256 avoids it")
    return notes


def _write(exported: ExportSource, file: Path, quantize: str, pre: str | None) -> list[str]:
    architecture = gguf_architecture(exported.config, exported.sizes)
    writer = GGUFWriter(file, architecture)
    try:
        _metadata(writer, exported, architecture, quantize)
        notes = add_tokenizer(writer, exported.tokenizer(), exported.config.vocab_size, pre)
        tensors = _tensors(exported, architecture)
        wide = 0
        for name, read in tensors:
            shape = read(shape_only=True)
            kind = _kind(shape, quantize)
            wide += len(shape) > 1 and kind.name != quantize
            in_bytes = gguf.quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), int(np.prod(in_bytes)), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, (_, read) in enumerate(tensors, start=1):  # one tensor in memory at a time
            tensor = read(shape_only=False)
            data = np.ascontiguousarray(tensor.float().numpy())
            kind = _kind(tuple(tensor.shape), quantize)
            writer.write_tensor_data(data if kind.name == "F32" else gguf.quantize(data, kind))
            exported.written(number, len(tensors))
    finally:
        writer.close()
    if wide:
        notes.append(f"{wide} matrices whose rows are no multiple of 32 numbers stayed F16; --round-to 32 avoids it")
    return notes


def _kind(shape: tuple[int, ...], quantize: str) -> GGMLQuantizationType:
    """The type of a tensor: vectors stay F32, and rows that do not divide into blocks F16."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if quantize == "Q8_0" and shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[quantize]


def _metadata(writer: GGUFWriter, exported: ExportSource, architecture: str, quantize: str) -> None:
    config, sizes = exported.config, exported.sizes
    base = str(getattr(config, "name_or_path", "") or exported.source.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(exported.source.name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, Path(base).name)
    writer.add_description("pruned by SlimGPT (arXiv 2412.18110)")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[quantize]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    one = is_uniform(sizes) and architecture in ("llama", "qwen3")
    for field, add in (
        (HEADS, writer.add_head_count),
        (KV_HEADS, writer.add_head_count_kv),
        (CHANNELS, writer.add_feed_forward_length),
    ):
        add(sizes[0][field] if one else [layer[field] for layer in sizes])
    d = head_dim(config)
    writer.add_key_length(d)
    writer.add_value_length(d)
    writer.add_rope_dimension_count(d)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = dict(config.rope_parameters or {})
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


class _Read:
    """A tensor as llama.cpp wants it, or only its shape."""

    def __init__(self, exported: ExportSource, names: list[str], heads: int | None = None):
        self.exported, self.names, self.heads = exported, names, heads

    def __call__(self, shape_only: bool) -> Any:
        if shape_only:
            shapes = [self.exported.weights.shape(name) for name in self.names]
            return (sum(shape[0] for shape in shapes), *shapes[0][1:])
        tensors = [self.exported[name] for name in self.names]
        if self.heads is not None:
            tensors = [interleave(tensor, self.heads) for tensor in tensors]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _Given(_Read):
    """A tensor that is no weight of the model."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __call__(self, shape_only: bool) -> Any:
        return tuple(self.tensor.shape) if shape_only else self.tensor


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of rotary pairs ``(0, 1), (2, 3), ..`` that llama.cpp's `NORM` kind rotates;
    Hugging Face rotates ``(0, d/2), (1, d/2 + 1), ..``."""
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _tensors(exported: ExportSource, architecture: str) -> list[tuple[str, _Read]]:
    """Every tensor's name in the file, and how to get it."""
    tensors: list[tuple[str, _Read]] = []
    rotated = architecture in ("llama", "deci")
    if (factors := rope_factors(exported.config)) is not None:
        tensors.append(("rope_freqs.weight", _Given(factors)))
    start = f"{exported.architecture.layers}."
    for name in exported.names:
        module, _, leaf = name.rpartition(".")
        if not name.startswith(start):
            tensors.append((f"{_AROUND[module]}.{leaf}", _Read(exported, [name])))
            continue
        index, _, inner = module[len(start) :].partition(".")
        if architecture == "openelm" and inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            if inner == "self_attn.q_proj":
                parts = [name.replace("q_proj", f"{p}_proj") for p in "qkv"]
                tensors.append((f"blk.{index}.attn_qkv.{leaf}", _Read(exported, parts)))
            continue
        heads = None
        if rotated and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            field = HEADS if inner.endswith("q_proj") else KV_HEADS
            heads = exported.sizes[int(index)][field]
        tensors.append((f"blk.{index}.{_NAMES[inner]}.{leaf}", _Read(exported, [name], heads)))
    return tensors


def rope_factors(config: Any) -> Tensor | None:
    """By what llama3's scaled positions divide each rotary frequency, ``(head_dim / 2,)``; ``None`` without it."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    d = head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    return plain / scaled


def _llama_types() -> dict[str, int]:
    """The types that llama-cpp-python's quantiser knows; empty where it is not installed."""
    if not installed():
        return {}
    import llama_cpp  # pyright: ignore[reportMissingImports]

    start = "LLAMA_FTYPE_MOSTLY_"
    return {name.removeprefix(start): getattr(llama_cpp, name) for name in dir(llama_cpp) if name.startswith(start)}


def _quantize(full: Path, file: Path, kind: str) -> None:
    types = _llama_types()
    if kind in types:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = types[kind]
        failed = llama_cpp.llama_model_quantize(str(full).encode(), str(file).encode(), ctypes.byref(options))
    else:
        done = subprocess.run(["llama-quantize", str(full), str(file), kind], check=False, capture_output=True)
        failed = done.returncode
    if failed:
        raise ExportError(f"llama.cpp's quantiser could not make {kind} of the model (code {failed})")
