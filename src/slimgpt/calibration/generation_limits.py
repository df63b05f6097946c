"""Type, memory and length of what a model writes."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from slimgpt.models.architecture import KV_HEADS
from slimgpt.models.lookup import head_dim, layer_sizes, text_config
from slimgpt.runtime.devices import DTYPES, matmul_seconds
from slimgpt.runtime.memory import USABLE_FRACTION, free_bytes, used_bytes

MUCH_FASTER = 0.7
"""Share of float32's seconds that bfloat16 may take on a CPU to be chosen."""

ROOM_FOR_CACHE = 1.2
"""Memory beside the weights for keys and values of a few documents."""


def writing_dtype(setting: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The type a model writes in: the one named; else 16 bits on a GPU, and on a CPU bfloat16 only where that is much
    faster than float32, so that the choice does not change from run to run."""
    if setting != "auto":
        return DTYPES[setting]
    if device.type != "cpu":
        return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    seconds = {dtype: matmul_seconds(512, 1024, device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    return torch.bfloat16 if seconds[torch.bfloat16] < MUCH_FASTER * seconds[torch.float32] else torch.float32


def fits_whole(parameters: int, itemsize: int, device: torch.device, budget: int | None, name: str) -> bool:
    """Whether a model can write text in one piece; if not, a warning says so: every layer is then loaded to the device
    for every token.

    Args:
        parameters: of the whole model.
        itemsize: bytes of each.
        budget: bytes that may be used on the device; ``None``: what is free.
    """
    needed = int(parameters * itemsize * ROOM_FOR_CACHE)
    room = free_bytes(device) * USABLE_FRACTION if budget is None else budget - used_bytes(device)
    if needed <= room:
        return True
    warnings.warn(
        f"{name} needs about {needed / 1e9:.1f} GB on {device} to write its calibration text in one piece, and "
        f"{max(room, 0) / 1e9:.1f} GB may be used: it writes layer by layer, which loads the model once for every "
        "token of a document; give text with --calibration FILE or demo, or raise --memory, to be faster",
        stacklevel=3,
    )
    return False


def sequences_together(
    model: PreTrainedModel, length: int, dtype: torch.dtype, device: torch.device, budget: int | None
) -> int:
    """Number of documents whose keys, values and predictions fit into a third of the free memory."""
    config = text_config(model.config)
    width = head_dim(config)
    heads = sum(sizes[KV_HEADS] for sizes in layer_sizes(model.config))
    each = 2 * heads * width * length * dtype.itemsize * 2 + 16 * config.vocab_size  # twice while rows are dropped
    room = free_bytes(device) if budget is None else max(budget - used_bytes(device), 0)
    return max(int(room / 3 / each), 1)
