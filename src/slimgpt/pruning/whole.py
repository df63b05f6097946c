"""The loop applied to a model in memory, and what it needs of memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.models.alignment import align
from slimgpt.models.architectures import CHANNELS
from slimgpt.models.heterogeneous import architecture_of, decoder_layers, layer_sizes, rebuild_layer
from slimgpt.models.mixtures import EXPERTS, Experts
from slimgpt.models.slicing import output_matrix
from slimgpt.models.stock import apply_sizes
from slimgpt.planning.plan import Plan
from slimgpt.pruning.memory import Need
from slimgpt.pruning.report import LayerReport
from slimgpt.pruning.sequential import Run, prune_layers, solver_dtype


def prune_model(
    model: PreTrainedModel, windows: Tensor, plan: Plan, config: PruneConfig, run: Run
) -> Iterator[LayerReport]:
    """Prune a model in place, one layer per step; its weights are taken to be finite.

    Layers are moved to the device one at a time and back to where they were. The model is whole after every
    step: if the iteration ends early, the layers that are done stay narrow and the config says so.

    Raises:
        NumericalError: NaN or infinity in activations, or a Hessian that is not positive definite.
    """
    architecture = architecture_of(model.config, model)
    layers = decoder_layers(model)
    sizes = layer_sizes(model.config)
    try:
        for finished in prune_layers(model, layers.__getitem__, windows, plan, config, run):
            index = finished.report.layer
            home = next(layers[index].parameters()).device
            new = rebuild_layer(layers[index], model.config, index, finished.state, finished.report.sizes)
            layers[index] = new.to(home)
            sizes[index] = finished.report.sizes
            yield finished.report
    finally:
        apply_sizes(model, architecture, sizes)
        align(model)


def memory_need(
    model: PreTrainedModel, windows: Tensor, plan: Plan, config: PruneConfig, dtype: torch.dtype | None, copied: bool
) -> Need:
    """What pruning needs on its device, from shapes alone.

    Args:
        model: the model, or its empty form.
        windows: the calibration tokens of this process.
        dtype: of the forward passes; ``None`` for that of the weights.
        copied: whether a layer's weights are copied to be run (another device or type), or used where they are.
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
            if isinstance(structure, Experts):  # solved one at a time
                out, n, keep = state[structure.key][0].numel() // sizes[CHANNELS], sizes[CHANNELS], target[CHANNELS]
                streams = max(streams, 5 if target[EXPERTS] < sizes[EXPERTS] else 4)
            else:
                out, n = output_matrix(state, structure).shape
                keep = n * structure.units(target) // structure.units(sizes)
            widest = max(widest, n)
            each = solver_dtype(n, torch.device("cpu")).itemsize
            # The Gram matrix and its inverse; the factor of what was removed; W, its repaired form and W H.
            solver_bytes = max(solver_bytes, (2 * n * n + (n - keep) * n + 3 * out * n) * each)
    work = batch * (3 * widest + 6 * out) * item
    return Need(layer_bytes + work, solver_bytes + layer_bytes, tokens * out * item, tokens * widest * item, streams)
