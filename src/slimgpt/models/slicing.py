"""From the state dict of a layer to that of a narrower one. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgpt.models.architecture import Fused, Sizes, Structure

State = dict[str, Tensor]


def unit_rows(length: int, units: int, kept: Tensor) -> Tensor:
    """The indices that the kept units own on an axis, ``(length / units * kept,)`` long.

    Raises:
        ValueError: ``units`` does not divide ``length``.
    """
    if length % units:
        raise ValueError(f"an axis of {length} does not split into {units} equal units")
    d = length // units
    return (kept.unsqueeze(1) * d + torch.arange(d, device=kept.device)).flatten()


def output_matrix(state: State, structure: Structure) -> Tensor:
    """The output matrix ``(out, n)`` of a structure."""
    W = state[structure.key]
    return W.T if structure.transposed else W


def slice_state(state: State, structure: Structure, sizes: Sizes, kept: Tensor, W_kept: Tensor) -> State:
    """The state dict of the layer with only the kept units of ``structure``.

    Args:
        state: the layer's state dict; it is left as it was, tensors that do not change are shared.
        structure: what is removed.
        sizes: the layer's widths before.
        kept: ``(keep,)`` long, sorted unit ids.
        W_kept: ``(out, kept columns)``, the repaired output matrix.
    """
    units, after = structure.units(sizes), structure.shrink(sizes, len(kept))
    W = W_kept.T.contiguous() if structure.transposed else W_kept
    sliced = {**state, structure.key: W}
    for item in structure.inputs:
        fused = Fused(item, (structure.sizes[0],), (0,)) if isinstance(item, str) else item
        for name in (fused.module, f"{fused.module}.weight", f"{fused.module}.bias"):  # a parameter, or a module's
            if name not in state:
                continue
            turn = structure.transposed and name.endswith(".weight")
            rows = state[name].T if turn else state[name]
            rows = _slice_rows(rows, fused, sizes, after, units, kept.to(rows.device))
            sliced[name] = (rows.T if turn else rows).contiguous()
    return sliced


def _slice_rows(rows: Tensor, fused: Fused, sizes: Sizes, after: Sizes, units: int, kept: Tensor) -> Tensor:
    """The rows of a module with those of the kept units in the parts that are sliced."""
    rest, total = rows.shape[1:], sum(sizes[part] for part in fused.parts)
    blocks = rows.reshape(fused.block_count(sizes), -1, *rest)
    pieces = list(blocks.split([blocks.shape[1] * sizes[part] // total for part in fused.parts], dim=1))
    for i in fused.sliced:
        flat = pieces[i].flatten(0, 1)  # in the order of the units
        pieces[i] = flat[unit_rows(len(flat), units, kept)]
    left = fused.block_count(after)
    return torch.cat([piece.reshape(left, -1, *rest) for piece in pieces], dim=1).flatten(0, 1)
