"""What a model's layers weigh and what each unit of them weighs, from the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.models.architectures import Structure
from slimgpt.models.heterogeneous import architecture_of, empty_model, layer_sizes
from slimgpt.models.slicing import output_matrix, slice_state


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer: its widths, its parameters, and the parameters that go with one unit of a kind.

    A unit of ``query`` is one query head from every KV group.
    """

    sizes: dict[str, int]
    parameters: int
    unit_parameters: dict[str, int]  # by "kv", "query", "ffn"; what the layer has not, or must keep, is not there


@dataclass(frozen=True)
class ModelShape:
    """Every decoder layer of a model, and the parameters around them (tied weights counted once)."""

    layers: tuple[LayerShape, ...]
    other_parameters: int

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.layer_parameters + self.other_parameters


def describe(config: PreTrainedConfig, model: PreTrainedModel | None = None) -> ModelShape:
    """Measure a model by building it without storage.

    Args:
        model: the empty or real model, if the caller has it already.

    Raises:
        UnsupportedFamilyError: the family is not in the table.
    """
    model = model or empty_model(config)
    architecture = architecture_of(config, model)
    layers = model.get_submodule(architecture.layers)
    shapes = []
    for layer, sizes in zip(layers.children(), layer_sizes(config), strict=True):
        state = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
        units = {
            structure.unit: _unit_parameters(state, structure, sizes)
            for structure in architecture.structures
            if f"{structure.output}.weight" in state
        }
        shapes.append(LayerShape(sizes, count(layer), units))
    return ModelShape(tuple(shapes), count_tied(model) - sum(shape.parameters for shape in shapes))


def count(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return _numel(module.parameters())


def count_tied(model: PreTrainedModel) -> int:
    """The number of parameters of a model, tied weights once, whether or not they have been tied yet."""
    tied = set(model.all_tied_weights_keys or ()) if getattr(model.config, "tie_word_embeddings", False) else set()
    return _numel(parameter for name, parameter in model.named_parameters() if name not in tied)


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _unit_parameters(state: dict[str, Tensor], structure: Structure, sizes: dict[str, int]) -> int:
    """What the layer loses with one unit (one from every group), measured by cutting its empty state dict."""
    units, groups = structure.units(sizes), structure.group_count(sizes)
    W = output_matrix(state, structure)
    keep = units - groups
    kept = torch.arange(keep)
    W_kept = W[:, : W.shape[1] * keep // units]
    before = {name: tensor.numel() for name, tensor in state.items()}
    after = slice_state(state, structure, sizes, kept, W_kept)
    return sum(before.values()) - _numel(after.values())
