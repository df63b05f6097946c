"""Groups of tensors in a quantised checkpoint's files: numbers, their scales, and those that are not needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimgpt.errors import ModelError, one_line
from slimgpt.models import dequantize
from slimgpt.models.quantization import PACKED_FORMATS, Quantization, group_block

Shape = tuple[int, ...]

NOT_NEEDED = (
    *("input_scale", "activation_scale", "input_scale_ub", "input_global_scale", "input_zero_point"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point"),
    "weight_format",
)
"""Last names of tensors that say how activations and the KV cache are quantised, which in 16 bits they are not; and
bitsandbytes' number for the only order of 8-bit numbers that is written today."""

NARROW_FLOATS = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor of the model that is stored in several.

    Args:
        parts: the names in the files.
        decode: makes it of the parts, in their order, and the type wanted.
        shape: its shape, from that of the first part; or, where that does not tell, from ``shape_part``.
        shape_part: the part that holds its shape as numbers.
    """

    parts: tuple[str, ...]
    decode: Callable[[list[Tensor], torch.dtype], Tensor]
    shape: Callable[[Any], Shape] = tuple
    shape_part: str | None = None


def quantized_tensors(
    where: str, kinds: Mapping[str, str], shapes: Callable[[str], Shape], quantization: Quantization
) -> tuple[dict[str, QuantizedTensor], set[str]]:
    """The model's tensors that are stored quantised, by name, and the names in the files that belong to none.

    Args:
        where: the folder, for messages.
        kinds: the stored tensors' names, with safetensors' names of their types.
        shapes: gives the shape of a stored tensor.

    Raises:
        ModelError: numbers lack their scales, or these are of another shape than they must be.
    """
    dropped = {name for name in kinds if name.rpartition(".")[2] in NOT_NEEDED}
    tensors = {}
    for name, kind in kinds.items():
        entry = None if name in dropped else _FINDERS.get(quantization.method, _scaled)(name, kind, kinds, quantization)
        if entry is not None:
            tensors[entry[0]] = entry[1]
    used = {part for tensor in tensors.values() for part in tensor.parts}
    for name, kind in kinds.items():
        integers = kind in ("I8", "U8") and name.endswith(".weight")
        if name not in used and name not in dropped and (kind in NARROW_FLOATS or integers):
            raise ModelError(f"{where} holds {name} in {kind}, and no scale beside it; fetch the files again")
    for name, tensor in tensors.items():
        _check_scales(where, name, tensor, kinds, shapes, quantization)
    return tensors, dropped


Found = tuple[str, QuantizedTensor] | None


def _scaled(name: str, kind: str, kinds: Mapping[str, str], quantization: Quantization) -> Found:
    """FP8, or int8 of compressed-tensors, with scales of one, for each row or by block."""
    if kind not in NARROW_FLOATS and not (kind == "I8" and quantization.method == "compressed-tensors"):
        return None
    scale = scale_name(name, kinds)
    if scale is None:
        return None
    zeros = f"{name}_zero_point"
    parts = (name, scale, *([zeros] if zeros in kinds else ()))
    block = _block_of(name, quantization)

    def decode(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        return dequantize.scaled(tensors[0], tensors[1], block, dtype, *tensors[2:])

    return name, QuantizedTensor(parts, decode)


def _mxfp4(name: str, kind: str, kinds: Mapping[str, str], quantization: Quantization) -> Found:
    target = name.removesuffix("_blocks")
    if target == name or f"{target}_scales" not in kinds or kind != "U8":
        return None

    def decode(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        return dequantize.mxfp4(tensors[0], tensors[1], dtype)

    def shape(blocks: Shape) -> Shape:
        experts, rows, groups, width = blocks
        return experts, 2 * groups * width, rows

    return target, QuantizedTensor((name, f"{target}_scales"), decode, shape)


def _modelopt(name: str, kind: str, kinds: Mapping[str, str], quantization: Quantization) -> Found:
    """FP8, or NVFP4: two numbers a byte, with a scale for every 16 columns and one for the tensor."""
    scales = f"{name}_scale", f"{name}_scale_2"
    if kind != "U8" or not all(scale in kinds for scale in scales):
        return _scaled(name, kind, kinds, quantization)

    def decode(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        return dequantize.nvfp4(tensors[0], tensors[1], tensors[2], dtype)

    return name, QuantizedTensor((name, *scales), decode, _two_a_byte)


def _compressed(name: str, kind: str, kinds: Mapping[str, str], quantization: Quantization) -> Found:
    module, _, leaf = name.rpartition(".")
    if leaf != "weight_packed":
        return _scaled(name, kind, kinds, quantization)
    if f"{module}.weight_g_idx" in kinds:
        raise ModelError(
            f"{module} is quantised in the order of its activations (weight_g_idx), which is not unpacked; give the "
            "checkpoint in 16 bits that it was made from"
        )
    roles = ("weight_packed", "weight_scale", "weight_zero_point", "weight_global_scale", "weight_shape")
    held = [role for role in roles if f"{module}.{role}" in kinds]
    group = quantization.group(module)
    form = str(group.get("format") or quantization.settings.get("format"))
    if form not in PACKED_FORMATS:
        raise ModelError(f"{name} is packed, and by the config its format is {form}; fetch config.json again")

    def decode(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        with _library(name):
            return dequantize.compressed(dict(zip(held, tensors)), group, form, dtype)

    parts = tuple(f"{module}.{role}" for role in held)
    if "weight_shape" in held:
        tensor = QuantizedTensor(parts, decode, lambda sizes: tuple(sizes.tolist()), f"{module}.weight_shape")
    else:
        tensor = QuantizedTensor(parts, decode, _two_a_byte)
    return f"{module}.weight", tensor


def _awq(name: str, kind: str, kinds: Mapping[str, str], quantization: Quantization) -> Found:
    module, _, leaf = name.rpartition(".")
    if leaf != "qweight" or kind != "I32":
        return None
    held = [role for role in ("qweight", "scales", "qzeros") if f"{module}.{role}" in kinds]

    def decode(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        with _library(name):
            return dequantize.awq(dict(zip(held, tensors)), quantization.settings, dtype)

    parts = tuple(f"{module}.{role}" for role in held)
    # int32 hold 8 numbers of 4 bits each, along the outputs.
    return f"{module}.weight", QuantizedTensor(parts, decode, lambda packed: (8 * packed[1], packed[0]))


def _bitsandbytes(name: str, kind: str, kinds: Mapping[str, str], quantization: Quantization) -> Found:
    if not name.endswith(".weight") or kind not in ("U8", "I8"):
        return None
    module = name.removesuffix("weight")
    states = sorted(other for other in kinds if other.startswith(f"{name}."))
    rows = f"{module}SCB"
    if kind == "I8" and rows in kinds:
        return name, QuantizedTensor((name, rows), partial(_decode_bitsandbytes, ["SCB"]))
    state = next((other for other in states if ".quant_state." in other), None)
    if state is None:
        return None
    roles = [other.removeprefix(f"{name}.") for other in states]
    return name, QuantizedTensor((name, *states), partial(_decode_bitsandbytes, roles), _state_shape, state)


def _state_shape(state: Tensor) -> Shape:
    """The shape of a matrix of 4 bits, from the JSON in its state."""
    return tuple(json.loads(bytes(state.tolist()))["shape"])


def _two_a_byte(packed: Shape) -> Shape:
    return *packed[:-1], 2 * packed[-1]


def _decode_bitsandbytes(roles: list[str], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    with _library("a tensor of bitsandbytes"):
        return dequantize.bitsandbytes(tensors[0], dict(zip(roles, tensors[1:])), dtype)


@contextmanager
def _library(name: str) -> Iterator[None]:
    """Say in one line what a library did not unpack.

    Raises:
        ModelError: in place of whatever it raised.
    """
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"{name} cannot be unpacked: {one_line(error)}; is it from the same checkpoint as the config?"
        ) from error


_FINDERS = {
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
"""By method; FP8 with scales beside it for all others."""


def scale_name(name: str, kinds: Mapping[str, str]) -> str | None:
    """The name of a tensor's scales: ``weight_scale_inv`` (DeepSeek, Qwen, Mistral), ``weight_scale`` (compressed-
    tensors, Model-Optimizer, FBGEMM), ``scale`` or ``qscale_weight``; all of them are multiplied with."""
    module = name.removesuffix("weight")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if module != name:
        names += [f"{module}scale", f"{module}qscale_weight"]
    return next((other for other in names if other in kinds), None)


def _block_of(name: str, quantization: Quantization) -> tuple[int, int] | None:
    if quantization.method != "compressed-tensors":
        return quantization.block
    return group_block(name, quantization.group(name.removesuffix(".weight")))


def _check_scales(
    where: str,
    name: str,
    tensor: QuantizedTensor,
    kinds: Mapping[str, str],
    shapes: Callable[[str], Shape],
    quantization: Quantization,
) -> None:
    number, *scales = tensor.parts
    if kinds[number] not in (*NARROW_FLOATS, "I8") or quantization.method == "bitsandbytes":
        return
    block = _block_of(name, quantization)
    for scale in scales:
        if not dequantize.fits(shapes(number), shapes(scale), block):
            by = f"blocks of {block[0]} x {block[1]}" if block else "no blocks"
            raise ModelError(
                f"{where}: {scale} is {shapes(scale)} and {number} is {shapes(number)}; with {by} by the config that "
                "is no scale for each tensor, row or block. Give the config.json that belongs to the files"
            )
