"""From quantised numbers and their scales to a matrix in 16 or 32 bits. Pure.

Products are formed in float32 and rounded once. Matrices are worked through in slices of rows, so that what is needed
beside the result stays small.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

CHUNK = 1 << 22
"""Numbers that are converted at a time."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of the 4-bit floating-point numbers of the OCP Microscaling specification, by their lower 3 bits."""

NVFP4_GROUP = 16
"""Columns that share a scale in NVFP4."""


def as_factors(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of 2 with a bias of 127 (E8M0)."""
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return scales.float()


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks along both axes of a matrix; the last ones may be cut short."""
    return -(-shape[-2] // block[0]), -(-shape[-1] // block[1])


def fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int] | None) -> bool:
    """Whether scales of this shape can be those of a tensor: one, one for each row, or one for each block."""
    numel = int(torch.Size(scales).numel())
    if numel == 1:
        return True
    if len(shape) < 2:
        return False
    lead, rows = tuple(shape[:-2]), shape[-2]
    if block is not None and scales == (*lead, *grid(shape, block)):
        return True
    return scales in ((*lead, rows), (*lead, rows, 1)) or (len(shape) == 3 and scales in (lead, (*lead, 1, 1)))


def scaled(
    numbers: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype, zeros: Tensor | None = None
) -> Tensor:
    """Numbers of 8 bits times their scales.

    Args:
        numbers: ``(..., rows, columns)``, FP8 or int8.
        scales: of one element, ``(..., rows, 1)``, ``(..., rows)``, or by block ``(..., ceil(rows / block[0]),
            ceil(columns / block[1]))``; see :func:`fits`.
        block: rows and columns that share a scale; ``None``: no blocks.
        zeros: what is subtracted before, of the shape of the scales.
    """
    rows, columns = numbers.shape[-2:] if numbers.ndim > 1 else (1, numbers.numel())
    matrices = numbers.reshape(-1, rows, columns)
    factors = _by_matrix(as_factors(scales), numbers.ndim, len(matrices))
    offsets = None if zeros is None else _by_matrix(zeros.float(), numbers.ndim, len(matrices))
    # Where there are as many scales as rows, or only one, that is plain; a block may be cut short, so else it is given.
    high, wide = (
        size if count == 1 else 1 if count == size else (block or (1, 1))[axis]
        for axis, (size, count) in enumerate(zip((rows, columns), factors.shape[1:]))
    )
    result = torch.empty(matrices.shape, dtype=dtype)
    step = max(1, CHUNK // columns)
    for index in range(len(matrices)):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            at = torch.arange(start, stop) // high
            values = matrices[index, start:stop].float()
            if offsets is not None:
                values -= _columns(offsets[index][at], wide, columns)
            values *= _columns(factors[index][at], wide, columns)
            result[index, start:stop] = values
    return result.view(numbers.shape)


def _by_matrix(factors: Tensor, axes: int, matrices: int) -> Tensor:
    """Scales as ``(matrices, count of rows, count of columns)``.

    Args:
        axes: of the numbers that they belong to.
    """
    if factors.numel() == 1:
        return factors.reshape(1, 1, 1).expand(matrices, 1, 1)
    if factors.ndim == axes:
        return factors.reshape(matrices, *factors.shape[-2:])
    return factors.reshape(matrices, -1, 1)  # a scale for each row, or for each matrix of a stack


def _columns(factors: Tensor, width: int, columns: int) -> Tensor:
    """Every factor repeated over its block's columns; one column stays as it is, to be broadcast."""
    return factors if width >= columns else factors.repeat_interleave(width, dim=1)[:, :columns]


def mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The experts' matrices of gpt-oss, as transformers has them: ``(experts, columns, rows)``.

    Args:
        blocks: ``(experts, rows, groups, 16)`` bytes, two numbers each.
        scales: ``(experts, rows, groups)`` exponents.
    """
    experts, rows, groups, width = blocks.shape
    result = torch.empty(experts, 2 * groups * width, rows, dtype=dtype)
    for index in range(experts):
        own = blocks[index : index + 1], scales[index : index + 1]
        result[index] = convert_moe_packed_tensors(*own, dtype=dtype, rows_per_chunk=CHUNK // 32)[0]
    return result


def nvfp4(packed: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix of NVIDIA's 4-bit numbers: each times the scale of its 16 columns and the scale of the tensor.

    Args:
        packed: ``(..., rows, columns / 2)`` bytes, the lower half first.
        scales: ``(..., rows, columns / 16)``, FP8.
        scale: one number, or one for each of the leading axes.
    """
    table = torch.tensor([*E2M1, *(-number for number in E2M1)])
    halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    result = torch.empty(halves.shape, dtype=dtype)
    overall = scale.float().reshape(-1, *[1] * (halves.ndim - 1)) if scale.numel() > 1 else scale.float().reshape(())
    factors = (scales.float() * overall).flatten(0, -2)
    step = max(1, CHUNK // halves.shape[-1])
    source, target = halves.flatten(0, -2), result.flatten(0, -2)
    for start in range(0, len(source), step):
        values = table[source[start : start + step].int()]
        target[start : start + step] = values * factors[start : start + step].repeat_interleave(NVFP4_GROUP, dim=1)
    return result


def compressed(parts: Mapping[str, Tensor], group: Mapping[str, Any], form: str, dtype: torch.dtype) -> Tensor:
    """A matrix of one of compressed-tensors' packed formats, by its own library.

    Args:
        parts: the module's tensors by their last names.
        group: the group of the config that the module belongs to.
        form: the format's name.
    """
    from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
    from compressed_tensors.quantization import QuantizationScheme  # pyright: ignore[reportMissingImports]

    compressor: Any = BaseCompressor.get_value_from_registry(form)
    return compressor.decompress(dict(parts), QuantizationScheme.model_validate(dict(group)))["weight"].to(dtype)


def awq(parts: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """A matrix ``(out, in)`` as AutoAWQ packs it, by compressed-tensors' converter and its unpacking.

    Args:
        parts: ``qweight``, ``scales`` and, with zero points, ``qzeros``.
        settings: the quantization_config.
    """
    from compressed_tensors.entrypoints.convert import AutoAWQConverter  # pyright: ignore[reportMissingImports]

    converter = AutoAWQConverter.from_autoawq_config(dict(settings))
    tensors = converter.process({f"m.{role}": tensor for role, tensor in parts.items()})
    config: Any = converter.update_config(None)
    (group,) = config.config_groups.values()  # one scheme for all, never a list of names
    held = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    return compressed(held, group.model_dump(), str(group.format), dtype)


def bitsandbytes(weight: Tensor, beside: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A matrix as bitsandbytes stores it, in 4 bits with its state or in 8 bits with a scale for each row.

    Args:
        beside: what is stored under the weight's name and a dot, by the rest of the name; or ``SCB``.
    """
    from bitsandbytes import functional  # pyright: ignore[reportMissingImports]

    if "SCB" in beside:  # int8 rows; 127 is the largest
        return scaled(weight, beside["SCB"].float() / 127, None, dtype)
    state = functional.QuantState.from_dict(dict(beside), device=torch.device("cpu"))
    return functional.dequantize_4bit(weight, state).to(dtype)
