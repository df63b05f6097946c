# Part of SlimGPT, Apache-2.0. This file travels inside every checkpoint whose layers differ in width, so that
# transformers can load it where slimgpt is not installed. It needs nothing but transformers and torch.
"""A Hugging Face causal LM whose decoder layers have different widths, built from ``config.per_layer_config``."""

from typing import Any

from transformers import PreTrainedConfig

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("this checkpoint needs a transformers release with PreTrainedConfig.per_layer_config (5.20+)")


class SlimMixin:
    """Comes before a causal LM class: builds every decoder layer from its own config."""

    _slim_layers = "model.layers"

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        # The model around the layers reads the global fields, such as the base class's dense layers here;
        # it does so only to be built, and what is built from them is replaced.
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        layers = self.get_submodule(self._slim_layers)
        for index in range(len(layers)):
            layers[index] = type(layers[index])(config.per_layer_config[index], index)
        self.post_init()

    def set_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, and also for the layers, which hold configs of their own."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        for layer in self.get_submodule(self._slim_layers):
            for module in layer.modules():
                if isinstance(getattr(module, "config", None), PreTrainedConfig):
                    module.config._attn_implementation_internal = self.config._attn_implementation
