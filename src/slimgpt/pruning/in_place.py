"""The loop applied to a model in memory, and what it needs of memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.io.tensors import align
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.build import architecture_of, decoder_layers, rebuild_layer
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.stock_config import apply_sizes
from slimgpt.planning.plan import Plan
from slimgpt.pruning.layer import SelectedUnits
from slimgpt.pruning.loop import prune_layers
from slimgpt.pruning.report import LayerReport


def prune_model(
    model: PreTrainedModel,
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    run: ExecutionContext,
    selected_units: SelectedUnits | None = None,
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
        for finished in prune_layers(
            model, layers.__getitem__, windows, plan, config, run, selected_units=selected_units
        ):
            index = finished.report.layer
            home = next(layers[index].parameters()).device
            new = rebuild_layer(layers[index], model.config, index, finished.state, finished.report.sizes)
            layers[index] = new.to(home)
            sizes[index] = finished.report.sizes
            yield finished.report
    finally:
        apply_sizes(model, architecture, sizes)
        align(model)
