"""From the state dict of a layer to that of a narrower one. Pure."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgpt.models.architectures import Sizes, Structure

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


def slice_state(state: State, structure: Structure, sizes: Sizes, kept: Tensor, W_kept: Tensor) -> State:
    """The state dict of the layer with only the kept units of ``structure``.

    Args:
        state: the layer's state dict; it is left as it was, tensors that do not change are shared.
        structure: what is removed.
        sizes: the layer's widths before.
        kept: ``(keep,)`` long, sorted unit ids.
        W_kept: ``(out, kept columns)``, the repaired output matrix.
    """
    units = structure.units(sizes)
    sliced = {**state, f"{structure.output}.weight": W_kept}
    for item in structure.inputs:
        module, parts, chosen = (
            (item, (structure.sizes[0],), (0,)) if isinstance(item, str) else (item.module, item.parts, item.sliced)
        )
        total = sum(sizes[field] for field in parts)
        for name in (f"{module}.weight", f"{module}.bias"):
            if name not in state:
                continue
            tensor = state[name]
            pieces = list(tensor.split([tensor.shape[0] * sizes[field] // total for field in parts]))
            for i in chosen:
                pieces[i] = pieces[i][unit_rows(len(pieces[i]), units, kept.to(tensor.device))]
            sliced[name] = pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
    return sliced
