# Part of SlimGPT, Apache-2.0. This file travels inside every checkpoint whose layers differ in width, so that
# transformers can load it where slimgpt is not installed. It needs nothing but transformers and torch.
"""A Hugging Face causal LM whose decoder layers have different widths, built from ``config.per_layer_config``."""

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("this checkpoint needs a transformers release with PreTrainedConfig.per_layer_config (5.14+)")


def is_no_note_on_global_values(record: logging.LogRecord) -> bool:
    """Filter of log records: drops transformers' note that a config's global value is read where layers have their own.

    It means nothing here: the model around the layers reads those values, and the layers read their own.
    """
    return not str(record.msg).startswith("Reading global config value for per-layer attribute")


logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").addFilter(is_no_note_on_global_values)


class SkippedAttention(nn.Module):
    """Stands where a layer has no attention: adds nothing to the hidden states, and nothing to the cache."""

    def forward(self, hidden_states: Any, *_: Any, **__: Any) -> Any:
        return torch.zeros_like(hidden_states), None


def skips_attention(own: Any) -> bool:
    """Whether a layer's own config says that it has no attention."""
    return "attention" in (getattr(own, "skip", None) or ())


def skip_attention(layer: Any, attention: Any) -> None:
    """Take the attention out of a layer, in place.

    Args:
        attention: the names of its module and of the norms that serve it alone.
    """
    module, *norms = attention
    layer.set_submodule(module, SkippedAttention())
    for norm in norms:
        layer.set_submodule(norm, nn.Identity())


def build_layer(cls: Any, config: Any, own: Any, index: int, resizing: Any = None, attention: Any = ()) -> Any:
    """A decoder layer of the widths in ``own``, its own config.

    Args:
        config: the model's config.
        resizing: ``None`` where the constructor of the family takes every width. Else the attention module, the head
            size, and for every matrix that shrinks its axis (``in`` or ``out``) and how many numbers each size stands
            for on it: the layer is built at full width, its attention as if the hidden size were heads times head
            size, and its matrices get their shapes afterwards.
        attention: see :func:`skip_attention`; for a layer whose own config says that it has none.
    """
    if resizing is None:
        layer = cls(own, index)
        if skips_attention(own):
            skip_attention(layer, attention)
        return layer
    attention, head_size, axes = resizing
    full = copy.copy(config)
    full.per_layer_config = None
    layer = cls(full, index)
    modules = dict(layer.named_modules())  # a layer without attention has not all of them
    matrices = {name: modules[name] for name, _, _ in axes if name in modules}
    if attention in modules and attention:
        narrow = copy.copy(own)
        narrow.hidden_size = own.num_attention_heads * head_size
        layer.set_submodule(attention, cls(narrow, index).get_submodule(attention))
    for name, axis, numbers in axes:
        if name in matrices:
            resize(matrices[name], axis, sum(getattr(own, size) * each for size, each in numbers))
            layer.set_submodule(name, matrices[name])
    return layer


def keep_buffers(old: Any, new: Any) -> None:
    """Give a new layer the buffers that the model, and not the layer's constructor, gave the old one."""
    buffers, modules = dict(new.named_buffers()), dict(new.named_modules())
    for name, buffer in old.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if name not in buffers and owner in modules:  # a layer without attention lacks its modules
            new.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)


def resize(matrix: Any, axis: str, length: int) -> None:
    """Give a Linear (or a Conv1D, which holds its transpose) another number of inputs or outputs."""
    conv = hasattr(matrix, "nf")
    shape = list(matrix.weight.shape)
    shape[(axis == "in") != conv] = length
    matrix.weight = nn.Parameter(matrix.weight.new_empty(shape), requires_grad=matrix.weight.requires_grad)
    if axis == "out" and matrix.bias is not None:
        matrix.bias = nn.Parameter(matrix.bias.new_empty(length), requires_grad=matrix.bias.requires_grad)
    setattr(matrix, {"in": "nx", "out": "nf"}[axis] if conv else f"{axis}_features", length)


class SlimMixin:
    """Comes before a causal LM class: builds every decoder layer from its own config."""

    _slim_layers = "model.layers"
    _slim_resizing: Any = None
    _slim_attention: Any = ()  # what a layer without attention lacks: its module, and the norms that serve it alone
    _slim_varying: Any = ()  # fields that differ by layer in the family's dense models, too

    # Without annotations: vLLM looks at those of a model's constructor, and stumbles over Any.
    def __init__(self, config, *args, **kwargs):
        # The model around the layers reads the global fields, such as the base class's dense layers here;
        # it does so only to be built, and what is built from them is replaced.
        text = config.get_text_config(decoder=True)
        text.allow_global_per_layer_attribute_access = True
        overrides = text.__dict__.pop("_heterogeneity_spec", None)
        if overrides is not None and self._slim_varying:
            own = {i: {k: v for k, v in layer.items() if k in self._slim_varying}
                   for i, layer in overrides.per_layer_overrides.items()}  # fmt: skip
            text.per_layer_config = copy.deepcopy(own)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        around = copy.copy(text)
        text._heterogeneity_spec = overrides
        self._narrow_layers(text, around)

    def _narrow_layers(self: Any, text: Any, around: Any) -> None:
        # Rotary embeddings ask for the config of a kind of layers, which must be the same in all of that kind.
        for module in self.modules():
            if getattr(module, "config", None) is text and not isinstance(module, PreTrainedModel):
                module.config = around
        layers = self.get_submodule(self._slim_layers)
        for index in range(len(layers)):
            own = text.per_layer_config[index]
            layer = build_layer(type(layers[index]), text, own, index, self._slim_resizing, self._slim_attention)
            keep_buffers(layers[index], layer)
            layers[index] = layer
        self.post_init()

    def initialize_weights(self: Any) -> None:
        """As in transformers, and also for the model around the layers.

        For custom code, modules without weights of their own are left out; this one fills tables that no file has.
        """
        super().initialize_weights()  # type: ignore[misc]
        self.base_model._init_weights(self.base_model)

    @classmethod
    def _can_set_experts_implementation(cls: Any) -> bool:
        # transformers looks for the experts in the file of the class, and they are in the stock class's.
        return cls.__mro__[cls.__mro__.index(SlimMixin) + 1]._can_set_experts_implementation()

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and also for the layers, which hold configs of their own."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        self._tell_layers("_attn_implementation")

    def set_experts_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and also for the layers."""
        super().set_experts_implementation(*args, **kwargs)  # type: ignore[misc]
        self._tell_layers("_experts_implementation")

    def _tell_layers(self: Any, choice: str) -> None:
        text = self.config.get_text_config(decoder=True)
        for layer in self.get_submodule(self._slim_layers):
            for module in layer.modules():
                if isinstance(getattr(module, "config", None), PreTrainedConfig):
                    setattr(module.config, f"{choice}_internal", getattr(text, choice))
