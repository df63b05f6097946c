# Part of SlimGPT, Apache-2.0. This file travels inside every nemotron-nas folder, so that engines which read configs
# through transformers (vLLM, SGLang) know its model type. It needs nothing but transformers.
"""The configuration of a nemotron-nas model: a Llama whose FFN widths are said layer by layer in ``block_configs``."""

from typing import Any

from transformers import PreTrainedConfig


class Block(dict):
    """A part of ``block_configs``: a JSON object whose keys are attributes, too, as engines read them."""

    def __init__(self, values: Any = (), **more: Any) -> None:
        parts = dict(values, **more)
        super().__init__({name: Block(part) if isinstance(part, dict) else part for name, part in parts.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(PreTrainedConfig):
    """A Llama's fields, all from config.json, and one entry of ``block_configs`` per layer.

    No LlamaConfig, which refuses that there is no one ``intermediate_size``.
    """

    model_type = "nemotron-nas"

    @property
    def block_configs(self) -> list[Block]:
        """The parts of every layer."""
        return self.__dict__["block_configs"]

    @block_configs.setter
    def block_configs(self, blocks: Any) -> None:
        self.__dict__["block_configs"] = [Block(block) for block in blocks]
