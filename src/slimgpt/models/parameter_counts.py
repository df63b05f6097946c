"""Parameters of a model's layers and of each unit in them, from the config alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.errors import ModelError
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes, Structure
from slimgpt.models.build import architecture_of, empty_model
from slimgpt.models.families.moe import EXPERTS, SHARED, Experts, Mixture
from slimgpt.models.lookup import layer_sizes, text_config
from slimgpt.models.slicing import output_matrix, slice_state


@dataclass(frozen=True)
class ExpertsShape:
    """Limits of the number of experts in a layer.

    Args:
        least: how few may stay.
        groups: groups of neighbouring experts, all of which lose the same number.
        tied: channels that the shared expert loses with one channel of every other; 0 where its width is its own.
    """

    least: int
    groups: int
    tied: int


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer: its widths, its parameters, and the parameters that go with one unit of a kind.

    A unit of ``query`` is one query head from every KV group. In a layer of experts a unit of ``ffn`` is one channel of
    every expert, with what the shared expert loses with it; ``channel`` is one channel of one expert, ``expert`` a
    whole one with its row of the router, ``shared`` one channel of the shared expert.
    """

    sizes: dict[str, int]
    parameters: int
    unit_parameters: dict[str, int]  # by "kv", "query", "ffn"; what the layer has not, or must keep, is not there
    experts: ExpertsShape | None = None
    attention_parameters: int = 0  # that go with the whole attention; 0 where it must stay, or is gone already

    @property
    def has_ffn(self) -> bool:
        """Whether it has an FFN, or experts, whose channels can be removed; some hybrids have layers without."""
        return "ffn" in self.unit_parameters

    def channel_parameters(self, sizes: Sizes) -> int:
        """The parameters of one FFN channel once the layer has these sizes: fewer, if experts are gone."""
        if self.experts is None:
            return self.unit_parameters.get("ffn", 0)
        return sizes[EXPERTS] * self.unit_parameters["channel"] + self.experts.tied * self.unit_parameters.get(
            "shared", 0
        )

    def removed_from_ffn(self, sizes: Sizes) -> int:
        """The parameters that the FFN, or the experts, lose with these sizes."""
        lost = self.sizes[CHANNELS] - sizes[CHANNELS]
        if self.experts is None:
            return lost * self.unit_parameters.get("ffn", 0)
        experts = self.sizes[EXPERTS] - sizes[EXPERTS]
        shared = self.sizes.get(SHARED, 0) - sizes.get(SHARED, 0)
        return (
            experts * self.unit_parameters["expert"]
            + sizes[EXPERTS] * lost * self.unit_parameters["channel"]
            + shared * self.unit_parameters.get("shared", 0)
        )


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
    def widest(self) -> int:
        """The largest of all sizes."""
        return max(max(layer.sizes.values()) for layer in self.layers)

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
        ModelError: heads that do not divide among the KV heads.
    """
    model = model or empty_model(config)
    architecture = architecture_of(config, model)
    layers = model.get_submodule(architecture.layers)
    shapes = []
    kept = attention_kept(config)
    for index, (layer, sizes) in enumerate(zip(layers.children(), layer_sizes(config), strict=True)):
        state = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
        heads, kv_heads = sizes[HEADS], sizes[KV_HEADS]
        if kv_heads and heads % kv_heads:
            raise ModelError(
                f"the config of layer {index} has num_attention_heads {heads} and num_key_value_heads {kv_heads}, and "
                "the first must be a multiple of the second; correct config.json, or fetch it again"
            )
        units = {
            structure.unit: _unit_parameters(state, structure, sizes)
            for structure in architecture.structures
            if structure.key in state and not isinstance(structure, Experts)
        }
        experts = None
        if EXPERTS in sizes and isinstance(architecture, Mixture):
            experts = _experts_shape(config, architecture, sizes)
            units |= _expert_parameters(layer, architecture.experts, sizes)
            units["ffn"] = sizes[EXPERTS] * units["channel"] + experts.tied * units.get("shared", 0)
        whole = 0
        if sizes[HEADS] and index not in kept:
            whole = sum(count(layer.get_submodule(module)) for module in architecture.attention)
        shapes.append(LayerShape(sizes, count(layer), units, experts, whole))
    return ModelShape(tuple(shapes), count_tied(model) - sum(shape.parameters for shape in shapes))


def attention_kept(config: PreTrainedConfig) -> set[int]:
    """The layers that keep their attention whatever is removed: the first of every kind.

    A model asks the cache of these layers how many tokens came before, and makes its masks from that; llama.cpp takes
    the head count of layer 0 for the whole model's.
    """
    kinds = getattr(text_config(config), "layer_types", None) or ["full_attention"]
    return {kinds.index(kind) for kind in kinds} | {0}


def _experts_shape(config: PreTrainedConfig, architecture: Mixture, sizes: Sizes) -> ExpertsShape:
    config = text_config(config)
    tied = sizes.get(SHARED, 0) // sizes[CHANNELS] if architecture.shared_count is not None else 0
    return ExpertsShape(architecture.least_experts(config), architecture.groups_of_experts(config), tied)


def _expert_parameters(layer: nn.Module, experts: Experts, sizes: Sizes) -> dict[str, int]:
    """Parameters of a whole expert, and of one channel of it: everything but its router's row and output bias."""
    own = {name: tensor.numel() for name, tensor in layer.named_parameters() if name.startswith(f"{experts.module}.")}
    rows = sum(
        tensor.numel()
        for name, tensor in layer.named_parameters()
        if name.startswith(f"{experts.router}.") or name in experts.per_expert
    )
    wide = sum(numel for name, numel in own.items() if not name.endswith("down_proj_bias"))
    return {
        "expert": (sum(own.values()) + rows) // sizes[EXPERTS],
        "channel": wide // sizes[EXPERTS] // sizes[CHANNELS],
    }


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
    """Parameters of one unit (one from every group) of a layer, measured by cutting its empty state dict."""
    units, groups = structure.units(sizes), structure.group_count(sizes)
    W = output_matrix(state, structure)
    keep = units - groups
    kept = torch.arange(keep)
    W_kept = W[:, : W.shape[1] * keep // units]
    before = {name: tensor.numel() for name, tensor in state.items()}
    after = slice_state(state, structure, sizes, kept, W_kept)
    return sum(before.values()) - _numel(after.values())


def measurable(shape: ModelShape) -> bool:
    """Whether all that can be removed are heads and channels of FFNs; a mixture is measured otherwise."""
    return all(layer.experts is None for layer in shape.layers)
