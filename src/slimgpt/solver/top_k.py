"""The highest scores of every group."""

from __future__ import annotations

import torch
from torch import Tensor


def top_per_group(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` highest scores of every row, counted through all rows.

    Args:
        scores: ``(groups, units per group)``.

    Returns:
        ``(groups * keep,)`` long, sorted, on the CPU.
    """
    best = scores.topk(keep, dim=1).indices
    first = torch.arange(len(scores), device=best.device).unsqueeze(1) * scores.shape[1]
    return (best + first).flatten().sort().values.cpu()
