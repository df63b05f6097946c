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
