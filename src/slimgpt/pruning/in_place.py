"""The loop applied to a model in memory."""

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
from slimgpt.pruning.report import LayerReport, PrunedLayer


class LayerReplacement:
    """Puts pruned layers into a model in memory, each on the device where the dense one was.

    The model is whole after every layer: if no more come, those that are done stay narrow and the config says so.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.architecture = architecture_of(model.config, model)
        self.layers = decoder_layers(model)
        self.sizes = layer_sizes(model.config)

    def write(self, layer: PrunedLayer) -> None:
        """Put a pruned layer in the dense one's place."""
        index = layer.report.layer
        home = next(self.layers[index].parameters()).device
        new = rebuild_layer(self.layers[index], self.model.config, index, layer.state, layer.report.sizes)
        self.layers[index] = new.to(home)
        self.sizes[index] = layer.report.sizes

    def close(self) -> None:
        """Write the widths into the model's config."""
        apply_sizes(self.model, self.architecture, self.sizes)
        align(self.model)


def prune_model(
    model: PreTrainedModel,
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    run: ExecutionContext,
    selected_units: SelectedUnits | None = None,
) -> Iterator[LayerReport]:
    """Prune a model in place, one layer per step; its weights are taken to be finite.

    Raises:
        NumericalError: NaN or infinity in activations, or a Hessian that is not positive definite.
    """
    replacement = LayerReplacement(model)
    load_layer = decoder_layers(model).__getitem__
    try:
        for layer in prune_layers(model, load_layer, windows, plan, config, run, selected_units=selected_units):
            replacement.write(layer)
            yield layer.report
    finally:
        replacement.close()
