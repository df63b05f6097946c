"""The class for a model of given widths: a stock one of transformers, or our subclass."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from slimgpt.models.architecture import HEADS, KV_HEADS, Architecture, Sizes, is_uniform
from slimgpt.models.build import empty_model, slim_class
from slimgpt.models.lookup import lookup, size_fields, text_config
from slimgpt.models.modeling_slim import SlimMixin
from slimgpt.models.remote_code import is_remote


def stock_config(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig | None:
    """The config with which a stock class computes the model at these widths, or ``None`` if there is none.

    The family's own class is taken if its validator accepts the head count. Else the class named by the table's
    ``relabel`` is, provided that it has exactly the same weights.

    Args:
        config: the config of the model before or after pruning.
        sizes: the widths that all layers have.
    """
    text = text_config(config)
    if (own := _own_config(text, sizes)) is not None:
        return own if text is config else _around(config, own)
    architecture = lookup(config)
    relabel = architecture.relabel if architecture is not None else None
    if relabel is None:
        return None
    target = type(AutoConfig.for_model(relabel.model_type))
    known = {field.name for field in dataclasses.fields(target)}  # type: ignore[arg-type]
    shared = {key: value for key, value in _values(config, sizes).items() if key in known}
    other = _validated(relabel.model_type, {**shared, **dict(relabel.fields)})
    if other is None:
        return None
    names = {name for name, _ in empty_model(config).named_parameters()}
    return other if names == {name for name, _ in empty_model(other).named_parameters()} else None


def apply_sizes(model: PreTrainedModel, architecture: Architecture, sizes: list[dict[str, int]]) -> None:
    """Write the widths of the layers into the model's config.

    They go into the global fields where all layers agree and the family's config accepts them, else into
    ``per_layer_config``; the model then becomes an instance of the subclass that builds its layers from that.
    """
    config = text_config(model.config)
    layers = [size_fields(config, layer) for layer in sizes]
    own = _varying(config, architecture)  # what differs by layer in the dense model, too
    config.per_layer_config = own or None  # type: ignore[assignment]
    if is_uniform(sizes) and _own_config(config, sizes[0]) is not None:
        for field, value in layers[0].items():
            setattr(config, field, value)
        return
    if "head_dim" in layers[0]:
        config.head_dim = layers[0]["head_dim"]  # type: ignore[attr-defined]
    for name, value in architecture.with_widths.items():
        setattr(config, name, value)
    overrides = {index: {**own.get(index, {}), **layer} for index, layer in enumerate(layers)}
    config.per_layer_config = overrides  # type: ignore[assignment]
    config.allow_global_per_layer_attribute_access = True
    if not isinstance(model, SlimMixin):
        model.__class__ = slim_class(type(model), model.config, architecture)


def _around(config: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """A multimodal model's config with another one for its language model."""
    name = next(name for name in config.sub_configs if getattr(config, name) is text_config(config))
    whole = copy.deepcopy(config)
    whole.__dict__.pop("auto_map", None)
    setattr(whole, name, text)
    return whole


def _values(config: PreTrainedConfig, sizes: Sizes) -> dict[str, Any]:
    """The fields of a config with these widths in place of its own."""
    drop = ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map", "architectures", "model_type")
    values = {key: value for key, value in config.to_dict().items() if key not in drop}
    architecture = lookup(config)
    own = _varying(config, architecture) if architecture is not None else {}
    return {**values, **size_fields(config, sizes), **({"per_layer_config": own} if own else {})}


def _varying(config: PreTrainedConfig, architecture: Architecture) -> dict[int, dict[str, Any]]:
    """The overrides by layer that the family's dense models have."""
    if not architecture.varying or not config.is_heterogeneous:
        return {}
    overrides = copy.deepcopy(config._heterogeneity_spec.per_layer_overrides)
    own = {i: {k: v for k, v in layer.items() if k in architecture.varying} for i, layer in overrides.items()}
    return {index: layer for index, layer in own.items() if layer}


def _own_config(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig | None:
    """The family's own config with these widths; ``None`` where it cannot say them, or its validator refuses them."""
    if (architecture := lookup(config)) is not None:
        dense = architecture.read(config.per_layer_config[0])
        written = architecture.write(dense)
        if architecture.resized and sizes[HEADS] != dense[HEADS]:
            return None
        known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)  # type: ignore[arg-type]
        if is_remote(type(config)):
            known |= set(inspect.signature(type(config).__init__).parameters)
        for field, value in architecture.write(sizes).items():
            follows = field == architecture.fields.get(KV_HEADS, KV_HEADS) and value == sizes[HEADS]
            if value != written.get(field) and field not in known and not follows:
                return None
    if is_remote(type(config)):
        own = type(config)(**_values(config, sizes))
        own.auto_map = config.auto_map  # its code goes along
        return own
    return _validated(config.model_type, _values(config, sizes))


def _validated(model_type: str, values: dict[str, Any]) -> PreTrainedConfig | None:
    try:
        return AutoConfig.for_model(model_type, **values)
    except StrictDataclassError:  # what transformers' config validators raise
        return None
