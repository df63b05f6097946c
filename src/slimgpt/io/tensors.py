"""Tensors that begin at multiples of 64 bytes, in memory and in files.

Matrix products can differ in the last bit with the address at which a factor begins: MKL works through whole vectors
of memory. torch's own tensors begin at multiples of 64 bytes, but NumPy's and those mapped from a file need not. So
files are written such that what is mapped from them lies like torch's own, and a model in memory and its reloaded
folder agree to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes; the widest vectors of today's processors."""

TYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types."""


def align(module: nn.Module) -> None:
    """Move the parameters and buffers of a module that are on the CPU to aligned memory, where they are not there."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def ordered_tensors(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Tensors in the order of :func:`write_tensors`, whatever order they come in."""
    return sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT > 0, item[0]))


def write_tensors(
    tensors: Mapping[str, Tensor],
    file: Path,
    metadata: Mapping[str, str] | None = None,
    *,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> None:
    """Write a safetensors file whose tensors begin at multiples of 64 bytes.

    The library's own writer aligns to 8. Tensors are sorted by name as it does, so that the same tensors make the same
    file whatever order they come in. The format leaves no room between tensors, so those whose
    size is no multiple of 64 (biases of odd widths, as a rule) come last, where only they are affected.

    Args:
        metadata: of the file, beside the format.
        whole: called on each tensor when it is written, so that of tensors that have to be gathered one is there.
    """
    ordered = ordered_tensors(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {"dtype": TYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for _, tensor in ordered:
            handle.write(whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
