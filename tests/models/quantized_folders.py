"""Folders of quantised checkpoints with the names of published ones, made by code that shares nothing with ours.

Every function takes the folder of a model in 16 bits, and writes the quantised folder beside what it was made of.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST = 448.0
"""Of the 8-bit numbers with 4 bits of exponent and 3 of mantissa."""

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

LINEAR = re.compile(r"\.layers\.\d+\..*(_proj|\.w[123]|gate_up_proj|down_proj)(\.weight)?$")
"""Matrices that published checkpoints quantise: not embeddings, heads, norms and routers."""


def rewrite(
    source: Path,
    folder: Path,
    quantise: Callable[[str, Tensor], dict[str, Tensor]],
    quantization: dict[str, Any] | None,
    chosen: Callable[[str], bool] = lambda name: bool(LINEAR.search(name)),
) -> Path:
    """Copy a model folder with some of its tensors quantised.

    Args:
        quantise: what is stored in place of a tensor.
        quantization: written into config.json as ``quantization_config``.
        chosen: which tensors are quantised.
    """
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, Tensor] = {}
    count = 0
    for name, tensor in load_file(source / "model.safetensors").items():
        if chosen(name) and tensor.ndim > 1:
            tensors |= quantise(name, tensor.float())
            count += 1
        else:
            tensors[name] = tensor
    assert count, "nothing was quantised"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def blocks_of(matrix: Tensor, block: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """Every block of a matrix with its place in the grid; the last ones may be smaller."""
    for i, start in enumerate(range(0, matrix.shape[0], block[0])):
        for j, left in enumerate(range(0, matrix.shape[1], block[1])):
            yield i, j, matrix[start : start + block[0], left : left + block[1]]


def fp8_in_blocks(matrix: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 numbers, the scales that they are multiplied with, and the matrix that they stand for in float64."""
    rows, columns = -(-matrix.shape[0] // block[0]), -(-matrix.shape[1] // block[1])
    numbers = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    scales, exact = torch.empty(rows, columns), matrix.double().clone()
    for (i, j, own), (*_, into), (*_, values) in zip(
        blocks_of(matrix, block), blocks_of(numbers, block), blocks_of(exact, block)
    ):
        scales[i, j] = own.abs().max() / LARGEST
        into.copy_((own / scales[i, j]).to(torch.float8_e4m3fn))
        values.copy_(into.to(torch.float64) * scales[i, j].double())
    return numbers, scales, exact


def fp8_per_row(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fp8_in_blocks`, with a scale for each row, ``(rows, 1)``."""
    return fp8_in_blocks(matrix, (1, matrix.shape[1]))


def fp8_per_tensor(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fp8_in_blocks`, with one scale that has no axes."""
    numbers, scales, exact = fp8_in_blocks(matrix, tuple(matrix.shape))  # type: ignore[arg-type]
    return numbers, scales[0, 0], exact


def nearest_fp4(value: float) -> int:
    """The code of the 4-bit number that is nearest, its sign in bit 3."""
    code = min(range(8), key=lambda index: abs(FP4[index] - abs(value)))
    return code + 8 * (value < 0)


def fp4_value(code: int) -> float:
    """The number that a code stands for."""
    return -FP4[code - 8] if code >= 8 else FP4[code]


def fp4_rows(rows: list[list[float]], group: int, scale_of: Callable[[float], tuple[Any, float]]):
    """Rows of numbers as codes, stored scales, and what they stand for.

    Args:
        group: columns that share a scale.
        scale_of: from the largest magnitude of a group, the stored scale and its value.
    """
    codes, scales, exact = [], [], []
    for row in rows:
        codes.append([])
        scales.append([])
        exact.append([])
        for start in range(0, len(row), group):
            values = row[start : start + group]
            stored, scale = scale_of(max(map(abs, values)))
            own = [nearest_fp4(value / scale) for value in values]
            codes[-1] += own
            scales[-1].append(stored)
            exact[-1] += [fp4_value(code) * scale for code in own]
    return codes, scales, exact


def two_a_byte(codes: list[list[int]]) -> Tensor:
    """Codes of 4 bits in bytes, the first in the lower half."""
    return torch.tensor([[a | b << 4 for a, b in zip(row[::2], row[1::2])] for row in codes], dtype=torch.uint8)


def mxfp4_stack(stack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks ``(experts, rows, groups, 16)``, exponents, and what they stand for, of ``(experts, columns, rows)``."""

    def scale_of(largest: float) -> tuple[int, float]:
        exponent = max(-126, min(127, int(torch.frexp(torch.tensor(max(largest, 1e-30))).exponent) - 3))
        return exponent + 127, 2.0**exponent

    blocks, exponents, exact = [], [], []
    for matrix in stack.mT:
        codes, scales, values = fp4_rows(matrix.tolist(), 32, scale_of)
        blocks.append(two_a_byte(codes).view(len(codes), -1, 16))
        exponents.append(torch.tensor(scales, dtype=torch.uint8))
        exact.append(torch.tensor(values, dtype=torch.float64).T)
    return torch.stack(blocks), torch.stack(exponents), torch.stack(exact)


def nvfp4(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bytes, FP8 scales for every 16 columns, the scale of the tensor, and what they stand for."""
    overall = matrix.abs().max() / (LARGEST * 6)

    def scale_of(largest: float) -> tuple[float, float]:
        stored = float(torch.tensor(max(largest / 6 / float(overall), 2**-6)).to(torch.float8_e4m3fn).float())
        return stored, stored * float(overall)

    codes, scales, exact = fp4_rows(matrix.tolist(), 16, scale_of)
    stored = torch.tensor(scales).to(torch.float8_e4m3fn)
    return two_a_byte(codes), stored, overall, torch.tensor(exact, dtype=torch.float64)


def int4_in_groups(matrix: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers from -8 to 7, scales by group of columns in bfloat16, and what they stand for."""
    wide = matrix.unflatten(1, (-1, group))
    scales = (wide.abs().amax(-1) / 7).to(torch.bfloat16)
    integers = (wide / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int64)
    exact = integers.double() * scales.double().unsqueeze(-1)
    return integers.flatten(1), scales, exact.flatten(1)


def pack(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Numbers from 0 to 15 packed by eight along the last axis into int32; ``order`` says which is in which place."""
    eights = codes.unflatten(-1, (-1, 8))
    words = sum(eights[..., column] << (4 * place) for place, column in enumerate(order))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
