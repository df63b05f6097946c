"""Memory that pruning needs, from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.shared_states import arguments_width, carried_width
from slimgpt.models.architecture import CHANNELS
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.families.moe import EXPERTS, Experts
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.slicing import output_matrix
from slimgpt.planning.plan import Plan
from slimgpt.pruning.layer import solver_dtype
from slimgpt.runtime.memory import MemoryRequirement


def memory_need(
    model: PreTrainedModel,
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    dtype: torch.dtype | None,
    copied: bool,
    *,
    processes: int = 1,
) -> MemoryRequirement:
    """Memory that pruning needs on its device, from shapes alone.

    Args:
        model: the model, or its empty form.
        windows: the calibration tokens of this process.
        dtype: of the forward passes; ``None`` for that of the weights.
        copied: whether a layer's weights are copied to be run (another device or type), or used where they are.
        processes: number of processes that share the windows; each holds the Gram matrices of as many experts.
    """
    architecture = architecture_of(model.config, model)
    layers = decoder_layers(model)
    tokens, batch = windows.numel(), min(config.batch_size, len(windows)) * windows.shape[1]
    layer_bytes = solver_bytes = widest = item = out = 0
    streams = 2
    for layer, sizes, target in zip(layers.children(), layer_sizes(model.config), plan.layers, strict=True):
        state = layer.state_dict()
        stored = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        numbers = sum(tensor.numel() for tensor in state.values())
        item = torch.empty((), dtype=dtype or next(layer.parameters()).dtype).element_size()
        layer_bytes = max(layer_bytes, stored + (numbers * item if copied else 0))
        for structure in architecture.chosen(plan.head_unit):
            if structure.key not in state:
                continue
            grams = 1
            if isinstance(structure, Experts):  # solved one at a time
                grams = min(processes, sizes[EXPERTS]) if config.method != "random" else 1
                out, n, keep = state[structure.key][0].numel() // sizes[CHANNELS], sizes[CHANNELS], target[CHANNELS]
                streams = max(streams, 5 if target[EXPERTS] < sizes[EXPERTS] else 4)
            else:
                out, n = output_matrix(state, structure).shape
                keep = n * structure.units(target) // structure.units(sizes)
            widest = max(widest, n)
            each = solver_dtype(n, torch.device("cpu")).itemsize
            # The Gram matrices and an inverse; the factor of what was removed; W, its repaired form and W H.
            solver_bytes = max(solver_bytes, ((1 + grams) * n * n + (n - keep) * n + 3 * out * n) * each)
    work = batch * (3 * widest + 6 * out) * item
    return MemoryRequirement(
        layer_bytes + work,
        solver_bytes + layer_bytes,
        tokens * (out + carried_width(model.config)) * item,
        tokens * widest * item,
        streams,
        tokens * arguments_width(model.config) * item,
    )
