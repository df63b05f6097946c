"""Models and layers of any width, always from Hugging Face's own constructors.

A layer is rebuilt from its sliced state dict and a config of its own rather than by cutting its Linears in place:
some families read sizes from the config in ``forward``, and the model in memory then comes from the same
constructor as the one that is read back from disk.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slimgpt.errors import UnsupportedFamilyError
from slimgpt.models import modeling_slim
from slimgpt.models.architectures import ARCHITECTURES, SIZE_FIELDS, Architecture, Sizes
from slimgpt.models.modeling_slim import SlimMixin
from slimgpt.models.slicing import State


@cache
def slim_class(base: type[PreTrainedModel], layers: str) -> type[PreTrainedModel]:
    """The subclass of a stock causal LM that builds every layer from its own config."""
    return type(f"Slim{base.__name__}", (SlimMixin, base), {"_slim_layers": layers, "__module__": __name__})


def modeling_source(base: type[PreTrainedModel], layers: str) -> str:
    """The text of the modeling file that travels with a checkpoint: the mixin and one class."""
    name = f"Slim{base.__name__}"
    return (
        inspect.getsource(modeling_slim).replace(
            "from transformers import PreTrainedConfig", f"from transformers import {base.__name__}, PreTrainedConfig"
        )
        + f'\n\nclass {name}(SlimMixin, {base.__name__}):\n    _slim_layers = "{layers}"\n'
    )


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal LM class that transformers has for this config.

    Raises:
        UnsupportedFamilyError: there is none.
    """
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]  # type: ignore[return-value]
    except KeyError:
        raise UnsupportedFamilyError(
            f"model_type '{config.model_type}' has no causal language model in transformers; "
            f"supported: {', '.join(ARCHITECTURES)}"
        ) from None


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: every shape, no storage."""
    base = stock_class(config)
    architecture = ARCHITECTURES.get(config.model_type)
    if config.is_heterogeneous and architecture is not None:
        base = slim_class(base, architecture.layers)
    with torch.device("meta"):
        return base(copy.deepcopy(config))


def architecture_of(config: PreTrainedConfig, model: nn.Module | None = None) -> Architecture:
    """The description of a config's family, checked against the modules of the model.

    Args:
        model: the model itself, or its empty form; built from the config if it is not given.

    Raises:
        UnsupportedFamilyError: the family is not in the table, or a module of its description is not there.
    """
    model = model or empty_model(config)
    known = ARCHITECTURES.get(config.model_type)
    missing = missing_module(model, known or ARCHITECTURES["llama"])
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    if known is None:
        found = (
            f"module '{missing}' was not found in {type(model).__name__}"
            if missing
            else "its modules are named like llama's, but nobody has verified that they can be cut like them"
        )
        raise UnsupportedFamilyError(f"model_type '{config.model_type}' is not supported: {found}; {supported}")
    if missing:
        raise UnsupportedFamilyError(
            f"model_type '{config.model_type}': module '{missing}' was not found in {type(model).__name__}; {supported}"
        )
    return known


def missing_module(model: nn.Module, architecture: Architecture) -> str | None:
    """The first module of a description that a model does not have."""
    try:
        layers = model.get_submodule(architecture.layers)
    except AttributeError:
        return architecture.layers
    for index, layer in enumerate(layers.children()):
        names = dict(layer.named_modules())
        for structure in (architecture.attention, architecture.ffn):
            for item in (structure.output, *structure.inputs):
                module = item if isinstance(item, str) else item.module
                if module not in names:
                    return f"{architecture.layers}.{index}.{module}"
    return None


def layer_sizes(config: PreTrainedConfig) -> list[dict[str, int]]:
    """The widths of every layer, from the config."""
    return [{field: int(getattr(layer, field)) for field in SIZE_FIELDS} for layer in config.per_layer_config]


def head_dim(config: PreTrainedConfig) -> int:
    """The size of one head; the same in every layer."""
    layer = config.per_layer_config[0]
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def with_sizes(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig:
    """A copy of a (layer's) config with other widths; ``head_dim`` is written so that it no longer follows them."""
    d = head_dim(config)
    narrow = copy.copy(config)
    for field, value in {**sizes, "head_dim": d}.items():
        setattr(narrow, field, value)
    return narrow


def rebuild_layer(layer: nn.Module, config: PreTrainedConfig, index: int, state: State) -> nn.Module:
    """A decoder layer like ``layer`` from its own constructor, a config of other widths and a state dict.

    No weight is copied. Buffers that the state dict does not carry come from ``layer``.
    """
    with torch.device("meta"):
        new = type(layer)(config, index)  # type: ignore[call-arg]
    new.load_state_dict(state, strict=True, assign=True)
    for name, buffer in list(new.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(owner), leaf, layer.get_buffer(name))
    return new.train(layer.training)
