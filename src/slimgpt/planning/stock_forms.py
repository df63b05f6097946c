"""Forms in which a stock class holds a pruned model: equal layers, or layers padded to the widest."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes
from slimgpt.models.families.moe import Experts
from slimgpt.models.lookup import is_slim, layer_sizes, lookup, text_config
from slimgpt.models.stock_config import stock_config

UNEQUAL = "the layers of this model differ in width or in kind"


def uniform_problem(config: PreTrainedConfig) -> str | None:
    """Why `prune --uniform` is refused for a model; ``None`` if it is not.

    Args:
        config: the dense model's; of a slim one, only what its layers still say of the dense ones is looked at.
    """
    layers = layer_sizes(config)
    first = next((sizes for sizes in layers if sizes[HEADS]), layers[0])
    alike = set if is_slim(config) else dict
    if any(alike(sizes) != alike(first) for sizes in layers):
        return UNEQUAL
    if stock_config(config, {**first, CHANNELS: max(first[CHANNELS] // 2, 1)}) is None:
        return "no stock class of transformers takes another width of its FFN"
    return None


def padded_sizes(sizes: Sequence[Sizes]) -> dict[str, int]:
    """The widths of the widest layer: as many KV heads as any layer has, and as many query heads on each of them."""
    kv = max(layer[KV_HEADS] for layer in sizes)
    group = max(layer[HEADS] // layer[KV_HEADS] for layer in sizes if layer[KV_HEADS])
    return {HEADS: kv * group, KV_HEADS: kv, CHANNELS: max(layer[CHANNELS] for layer in sizes)}


def padded_problem(config: PreTrainedConfig, layers: Sequence[Sizes]) -> str | None:
    """Why layers of these widths cannot be padded for a stock class; ``None`` if they can."""
    architecture, family = lookup(config), f"'{config.model_type}'"
    if text_config(config) is not config:
        return "the language model inside a multimodal model cannot be padded"
    if architecture is None or architecture.resized or any(s.transposed for s in architecture.structures):
        return f"{family} cannot be padded: its config does not say the widths, or its matrices are transposed"
    if any(isinstance(structure, Experts) for structure in architecture.structures):
        return f"{family} has experts, which are not padded"
    widest = padded_sizes(layers)
    if stock_config(config, widest) is None:
        return f"no stock class of transformers holds the widths {widest}"
    return None


def stock_forms(config: PreTrainedConfig, layers: Sequence[Sizes], prune: str, pad: str) -> str:
    """The ways into a stock class that are open to a model, joined by "or"; empty where there is none.

    Args:
        layers: the widths of its layers, which differ.
        prune: the words for pruning to equal layers.
        pad: the words for padding.
    """
    ways = [prune] if uniform_problem(config) is None else []
    return ", or ".join([*ways, *([pad] if padded_problem(config, layers) is None else [])])
