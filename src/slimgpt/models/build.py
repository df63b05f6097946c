"""Models and layers of any width, always from Hugging Face's own constructors.

A layer is rebuilt from its sliced state dict and a config of its own rather than by cutting its Linears in place:
some families read sizes from the config in ``forward``, and the model in memory then comes from the same
constructor as the one that is read back from disk.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from slimgpt.errors import ModelError, UnsupportedFamilyError, one_line
from slimgpt.models import modeling_slim
from slimgpt.models.architecture import HEADS, KV_HEADS, Architecture, Sizes
from slimgpt.models.families import LLAMA, MULTIMODAL
from slimgpt.models.families.unknown import HELP, found_in
from slimgpt.models.lookup import head_dim, is_slim, lookup, missing_module, refusal, text_config, with_sizes
from slimgpt.models.modeling_slim import SlimMixin, build_layer, keep_buffers, skips_attention
from slimgpt.models.remote_code import AUTO_CONFIG, is_remote, model_class, reference
from slimgpt.models.slicing import State

MODELING_FILE = "modeling_slim.py"
"""The file in a checkpoint whose layers differ in width that holds its class."""

Resizing = tuple[str, int, tuple[tuple[str, str, tuple[tuple[str, int], ...]], ...]]
"""The attention module, the head size, and the axes of matrices with the sizes along them."""


def resizing(config: PreTrainedConfig, architecture: Architecture) -> Resizing | None:
    """Widths of layers whose constructors do not take them; see ``modeling_slim.py``."""
    if not architecture.resized:
        return None
    each = {HEADS: head_dim(config), KV_HEADS: head_dim(config)}
    attention = next((s.container for s in architecture.structures if s.name == "heads"), "")

    def numbers(parts: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
        return tuple((architecture.fields.get(part, part), each.get(part, 1)) for part in parts)

    rows = ((module, "out", numbers(parts)) for module, parts in architecture.rows().items())
    columns = ((module, "in", numbers((size,))) for module, size in architecture.columns().items())
    return attention, head_dim(config), (*rows, *columns)


@cache
def _slim_class(
    base: type[PreTrainedModel],
    layers: str,
    resizing: Resizing | None,
    attention: tuple[str, ...],
    varying: tuple[str, ...],
) -> type[PreTrainedModel]:
    values: dict[str, Any] = {"_slim_layers": layers, "_slim_resizing": resizing, "_slim_attention": attention}
    values |= {"_slim_varying": varying, "__module__": __name__}
    return type(f"Slim{base.__name__}", (SlimMixin, base), values)


def slim_class(
    base: type[PreTrainedModel], config: PreTrainedConfig, architecture: Architecture
) -> type[PreTrainedModel]:
    """The subclass of a stock causal LM that builds every layer from its own config."""
    varying = tuple(sorted(architecture.varying))
    return _slim_class(base, architecture.layers, resizing(config, architecture), architecture.attention, varying)


def slim_bases(base: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """The stock classes of the modeling file's classes, by the Auto class that asks for them.

    Engines that bring a head of their own (vLLM's Transformers backend, SGLang's) build with ``AutoModel``.
    """
    bases = {"AutoModelForCausalLM": base}
    if config.model_type in MULTIMODAL:
        bases["AutoModelForImageTextToText"] = base
    elif type(config) in AutoModel._model_mapping:
        bases["AutoModel"] = AutoModel._model_mapping[type(config)]  # type: ignore[assignment]
    return bases


def slim_auto_map(base: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, str]:
    """The ``auto_map`` of a checkpoint with a modeling file."""
    module = MODELING_FILE.removesuffix(".py")
    own = {AUTO_CONFIG: reference(type(config))} if is_remote(type(config)) else {}
    return {**own, **{auto: f"{module}.Slim{stock.__name__}" for auto, stock in slim_bases(base, config).items()}}


def modeling_source(base: type[PreTrainedModel], config: PreTrainedConfig, architecture: Architecture) -> str:
    """The text of the modeling file that travels with a checkpoint: the mixin, and the classes of its ``auto_map``."""
    shape_overrides, stock_classes = resizing(config, architecture), set(slim_bases(base, config).values())
    skipped = any(skips_attention(own) for own in text_config(config).per_layer_config)
    names = sorted(stock.__name__ for stock in stock_classes if not is_remote(stock))
    imported = ", ".join([*names, "PreTrainedConfig"])
    text = inspect.getsource(modeling_slim).replace(
        "from transformers import PreTrainedConfig", f"from transformers import {imported}"
    )
    for stock in filter(is_remote, stock_classes):
        module, _, name = reference(stock).rpartition(".")
        text = text.replace("\nif not hasattr(", f"\nfrom .{module} import {name}\n\nif not hasattr(", 1)
    for stock in sorted(stock_classes, key=lambda stock: stock.__name__):
        layers = architecture.layers
        if stock is not base:
            layers = layers.removeprefix(f"{base.base_model_prefix}.")
        text += f'\n\nclass Slim{stock.__name__}(SlimMixin, {stock.__name__}):\n    _slim_layers = "{layers}"\n'
        text += f"    _slim_resizing = {shape_overrides!r}\n" if shape_overrides is not None else ""
        text += f"    _slim_attention = {architecture.attention!r}\n" if skipped else ""
        text += f"    _slim_varying = {tuple(sorted(architecture.varying))!r}\n" if architecture.varying else ""
    return text


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the whole model that transformers has for this config: a causal LM, or one that also reads images.

    A config with a part for text may have a causal LM class too, for the text alone; that one holds another model.

    Raises:
        UnsupportedFamilyError: there is none.
    """
    if (own := model_class(config)) is not None:
        return own
    classes = [AutoModelForCausalLM, AutoModelForImageTextToText]
    for auto in classes if text_config(config) is config else classes[::-1]:
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]  # type: ignore[return-value]
    if (reason := refusal(config)) is not None:
        raise UnsupportedFamilyError(f"model_type '{config.model_type}' is not supported: {reason}")
    raise UnsupportedFamilyError(
        f"transformers has no class for model_type '{config.model_type}' that is a causal language model, alone or "
        "with images; `slimgpt families` lists those that are supported"
    )


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: every shape, no storage.

    Raises:
        UnsupportedFamilyError: transformers has no class for it.
        ModelError: its values do not fit together.
    """
    base = stock_class(config)
    architecture = lookup(config)
    if architecture is not None and is_slim(config):
        base = slim_class(base, config, architecture)
    try:
        with torch.device("meta"):
            return base(copy.deepcopy(config))
    except ImportError as error:
        name = f" '{config.name_or_path}'" if config.name_or_path else ""
        raise ModelError(f"the class of the model{name} needs a library that is missing: {one_line(error)}") from error
    except Exception as error:  # the constructors check little: whatever a value in the config made of it
        reason = one_line(error)
        if "NoneType" in reason:
            reason += "; a value that its class needs is null or missing in config.json: fetch the file again"
        padding, vocabulary = text_config(config).pad_token_id, text_config(config).vocab_size
        if isinstance(error, AssertionError) and padding is not None and padding >= vocabulary:
            reason = (
                f"pad_token_id is {padding}, and the vocabulary has {vocabulary:,} tokens; set it to null or to an id "
                "below, or resize the embeddings (resize_token_embeddings) and save the model again"
            )
        name = f" '{config.name_or_path}'" if config.name_or_path else ""
        raise ModelError(f"the config of the model{name} describes none that can be built: {reason}") from error


def architecture_of(config: PreTrainedConfig, model: nn.Module | None = None) -> Architecture:
    """The description of a config's family, checked against the modules of the model.

    Args:
        model: the model itself, or its empty form; built from the config if it is not given.

    Raises:
        UnsupportedFamilyError: the family is not in the table, or a module of its description is not there.
    """
    model = model or empty_model(config)
    known = lookup(config)
    missing = missing_module(model, known or LLAMA)
    if known is not None and missing is None:
        return known
    family = f"model_type '{config.model_type}'"
    if (reason := refusal(config)) is not None:
        raise UnsupportedFamilyError(f"{family} is not supported: {reason}; see `slimgpt families`")
    if known is not None:
        reason = f"{family} is described otherwise: module '{missing}' was not found in {type(model).__name__}"
    elif missing is None:
        reason = (
            f"{family} is not supported: its modules are named like llama's, and nobody has verified that they can be "
        )
        reason += "cut like them"
    else:
        reason = f"{family} is not supported: nobody has described it"
    raise UnsupportedFamilyError(
        f"{reason}. {HELP} says how to describe it; `slimgpt families` lists what is supported. "
        f"In {type(model).__name__} there is\n{found_in(model)}"
    )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model of a family in the table.

    Raises:
        UnsupportedFamilyError: its family is not there.
    """
    layers = model.get_submodule(architecture_of(model.config, model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def empty_layer(layer: nn.Module, config: PreTrainedConfig, index: int, sizes: Sizes | None = None) -> nn.Module:
    """A decoder layer like ``layer`` on the meta device, from its own constructor and a config of its own.

    Args:
        config: the model's config.
        sizes: the widths of the new layer; by default what the config says.
    """
    architecture = lookup(config) or LLAMA
    how, config = resizing(config, architecture), text_config(config)
    own = config.per_layer_config[index]
    if sizes is None and how is not None:
        sizes = architecture.read(own, index)  # a dense config need not write all of them
    if sizes is not None:
        own = with_sizes(own, sizes)
    with torch.device("meta"):
        return build_layer(type(layer), config, own, index, how, architecture.attention)


def rebuild_layer(
    layer: nn.Module, config: PreTrainedConfig, index: int, state: State, sizes: Sizes | None = None
) -> nn.Module:
    """A decoder layer like ``layer`` from its own constructor, a config of its own and a state dict.

    No weight is copied. Buffers that the state dict does not carry come from ``layer``.

    Args:
        config: the model's config.
        sizes: the widths of the new layer; by default what the config says.
    """
    new = empty_layer(layer, config, index, sizes)
    keep_buffers(layer, new)
    new.load_state_dict(state, strict=True, assign=True)
    for name, buffer in list(new.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(new.get_submodule(owner), leaf, layer.get_buffer(name))
    return new.train(layer.training)
