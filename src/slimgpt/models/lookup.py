"""From a config to the description of its family and to its widths."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from slimgpt.errors import UsageError
from slimgpt.models.architecture import Architecture, Sizes
from slimgpt.models.families import ARCHITECTURES, LLAMA, MULTIMODAL, PARTS, REFUSED
from slimgpt.models.modeling_slim import skips_attention


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the language model: itself, or the part of a multimodal model's config."""
    return config.get_text_config(decoder=True)


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that a model takes; ``None`` where its config names none."""
    return getattr(text_config(config), "max_position_embeddings", None)


def check_context(config: PreTrainedConfig, subject: str, tokens: int) -> None:
    """Refuse more tokens than the model has positions for.

    Args:
        subject: noun phrase for what has so many tokens; the message begins with it.

    Raises:
        UsageError: they are too many.
    """
    longest = context_length(config)
    if longest is not None and tokens > longest:
        raise UsageError(f"{subject} of {tokens:,} tokens: that is longer than the model's context of {longest:,}")


def check_ids(ids: Tensor, vocabulary: int, subject: str) -> None:
    """Refuse token ids that have no row in the embedding.

    Args:
        vocabulary: the rows of the embedding.
        subject: noun phrase for what has these ids; the message begins with it.

    Raises:
        UsageError: one is negative or too large.
    """
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.numel():
        raise UsageError(
            f"{subject}: token id {int(outside[0])} is outside the model's vocabulary of {vocabulary:,} tokens. Give "
            "the tokenizer that belongs to the model, or, if tokens were added to it, call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )


def lookup(config: PreTrainedConfig) -> Architecture | None:
    """The description of a config's family, unchecked; ``None`` if the table has none."""
    architecture, text = _described(config), text_config(config)
    if not isinstance(architecture, Architecture) or text is config:
        return architecture if isinstance(architecture, Architecture) else None
    prefix = MULTIMODAL.get(config.model_type)
    layers = f"{prefix}.{architecture.layers.removeprefix('model.')}"
    return replace(architecture, layers=layers, relabel=None) if prefix else None


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a model of this config is refused, if somebody has looked at its family; else ``None``."""
    reason = _described(config)
    if isinstance(reason, str):
        return reason
    return REFUSED.get(config.model_type, REFUSED.get(text_config(config).model_type) if reason is None else None)


def _described(config: PreTrainedConfig) -> Architecture | str | None:
    text = text_config(config)
    entry = ARCHITECTURES.get(text.model_type, PARTS.get(text.model_type))
    return entry(text) if callable(entry) else entry


def is_slim(config: PreTrainedConfig) -> bool:
    """Whether layers have widths of their own, beyond what differs by layer in the family's dense models."""
    text, architecture = text_config(config), lookup(config)
    differing = text.per_layer_attributes or set()
    if any(skips_attention(layer) for layer in text.per_layer_config):
        return True
    return bool(differing - (architecture.varying if architecture is not None else set()))


def missing_module(model: nn.Module, architecture: Architecture) -> str | None:
    """The first module of a description that no layer of a model has, or that one has only in part."""
    try:
        layers = model.get_submodule(architecture.layers)
    except AttributeError:
        return architecture.layers
    layers_modules = [{**dict(layer.named_modules()), **dict(layer.named_parameters())} for layer in layers.children()]
    for structure in architecture.structures:
        # Dense layers and layers of experts stand in for each other: a model need not have both.
        alternatives = [other.output for other in architecture.structures if other.unit == structure.unit]
        if not any(output in modules for modules in layers_modules for output in alternatives):
            return f"{architecture.layers}.*.{structure.output}"
        for index, modules in enumerate(layers_modules):
            for module in structure.modules if structure.output in modules else ():
                if module not in modules:
                    return f"{architecture.layers}.{index}.{module}"
    return None


def layer_sizes(config: PreTrainedConfig) -> list[dict[str, int]]:
    """The widths of every layer, from the config."""
    architecture = lookup(config) or LLAMA
    return [architecture.read(layer, index) for index, layer in enumerate(text_config(config).per_layer_config)]


def head_dim(config: PreTrainedConfig) -> int:
    """The size of one head; the same in every layer."""
    architecture, config = lookup(config), text_config(config)
    if architecture is not None and architecture.resized:  # the model's config keeps the dense head count
        return config._getattr_without_heterogeneous_validation("hidden_size") // (
            config._getattr_without_heterogeneous_validation("num_attention_heads")
        )
    layer = config.per_layer_config[0]
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def with_sizes(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """A copy of a (layer's) config with other widths; ``head_dim`` is written so that it no longer follows them."""
    narrow = copy.copy(config)
    for field, value in size_fields(config, sizes).items():
        setattr(narrow, field, value)
    return narrow


def size_fields(config: PreTrainedConfig, sizes: Sizes) -> dict[str, Any]:
    """The config fields that say these widths, ``head_dim`` among them where the family takes it."""
    architecture = lookup(config) or LLAMA
    values = {config.attribute_map.get(name, name): value for name, value in architecture.write(sizes).items()}
    if architecture.varying:
        return {name: value for name, value in values.items() if name not in architecture.varying}
    return values if architecture.resized else {**values, "head_dim": head_dim(config)}
