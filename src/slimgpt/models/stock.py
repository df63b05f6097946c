"""Whether a stock class of transformers can hold a model whose layers all have the same widths."""

from __future__ import annotations

import dataclasses

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from slimgpt.models.architectures import ARCHITECTURES, Sizes
from slimgpt.models.heterogeneous import empty_model, head_dim


def stock_config(config: PreTrainedConfig, sizes: Sizes) -> PreTrainedConfig | None:
    """The config with which a stock class computes the model at these widths, or ``None`` if there is none.

    The family's own class is taken if its validator accepts the head count. Else the class named by the table's
    ``relabel`` is, provided that it has exactly the same weights.

    Args:
        config: the config of the model before or after pruning.
        sizes: the widths that all layers have.
    """
    own = config.to_dict()
    for key in ("per_layer_config", "allow_global_per_layer_attribute_access"):
        own.pop(key, None)
    own.update(sizes, head_dim=head_dim(config))
    architecture = ARCHITECTURES[config.model_type]
    if (same := _validated(config.model_type, own)) is not None:
        return same
    if architecture.relabel is None:
        return None
    target = type(AutoConfig.for_model(architecture.relabel.model_type))
    known = {field.name for field in dataclasses.fields(target)}  # type: ignore[arg-type]
    shared = {key: value for key, value in own.items() if key in known and key not in ("model_type", "architectures")}
    other = _validated(architecture.relabel.model_type, {**shared, **dict(architecture.relabel.fields)})
    if other is None:
        return None
    names = {name for name, _ in empty_model(config).named_parameters()}
    return other if names == {name for name, _ in empty_model(other).named_parameters()} else None


def _validated(model_type: str, values: dict) -> PreTrainedConfig | None:
    values = {key: value for key, value in values.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(model_type, **values)
    except StrictDataclassError:  # what transformers' config validators raise
        return None
