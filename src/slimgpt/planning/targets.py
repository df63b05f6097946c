"""Targets of a plan other than a ratio: parameters, bytes, or bytes of KV cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedConfig

from slimgpt.errors import PlanError
from slimgpt.models.architecture import KV_HEADS
from slimgpt.models.lookup import head_dim, text_config
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.runtime.units import CacheTarget, parse_cache

__all__ = ["CacheTarget", "cache_bytes", "kv_heads_for", "parameters_for", "parse_cache"]

CACHE_BYTES = 2
"""Bytes of a number in the KV cache: engines keep it in 16 bits."""

STATEFUL = ("conv", "mamba", "recurrent", "mlp", "moe")
"""Types of layers without a KV cache."""

HEADER_BYTES = 256
"""What a safetensors header takes for one tensor, generously."""


def parameters_for(size: int, itemsize: int, tensors: int) -> int:
    """Number of parameters that fit into so many bytes of safetensors files with so many tensors.

    Raises:
        PlanError: none does.
    """
    headers = HEADER_BYTES * (tensors + 2)
    if size <= headers:
        raise PlanError(f"{size:,} bytes are less than what the headers of the files take, about {headers:,}")
    return (size - headers) // itemsize


def cache_bytes(config: PreTrainedConfig, kv_heads: Sequence[int], context: int) -> int:
    """Bytes of the KV cache for a context of so many tokens; sliding windows keep no more than their width.

    Args:
        kv_heads: KV heads of every layer.
    """
    latent = getattr(config, "kv_lora_rank", None)
    if latent:  # one latent vector and one rotary key for all heads
        return len(kv_heads) * (latent + config.qk_rope_head_dim) * CACHE_BYTES * context
    return sum(heads * cost for heads, cost in zip(kv_heads, _cost_per_head(config, len(kv_heads), context)))


def kv_heads_for(
    config: PreTrainedConfig, shape: ModelShape, target: CacheTarget, uniform: bool, *, without: Collection[int] = ()
) -> list[int]:
    """The most KV heads per layer that fit, taken from where most are left, later layers first.

    Args:
        without: layers that lose their attention, and so all their KV heads.

    Raises:
        PlanError: one head per layer is too much already, or the target asks for nothing.
    """
    if getattr(config, "kv_lora_rank", None):
        raise PlanError(f"'{config.model_type}' keeps one latent vector for all heads: removing heads leaves its cache")
    heads = [0 if index in without else layer.sizes[KV_HEADS] for index, layer in enumerate(shape.layers)]
    least = [min(count, 1) for count in heads]
    dense = list(heads)
    if cache_bytes(config, heads, target.context) <= target.bytes:
        return heads
    if cache_bytes(config, least, target.context) > target.bytes:
        raise PlanError(
            f"one KV head per layer at {target.context:,} tokens takes "
            f"{cache_bytes(config, least, target.context):,} bytes, more than the {target.bytes:,} asked for"
        )
    while cache_bytes(config, heads, target.context) > target.bytes:
        if uniform:
            heads = [max(count - 1, 1) for count in heads]
            continue
        left = [(count / full if count > 1 else 0.0, index) for index, (count, full) in enumerate(zip(heads, dense))]
        heads[max(left)[1]] -= 1
    return heads


def _cost_per_head(config: PreTrainedConfig, layers: int, context: int) -> list[int]:
    config = text_config(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    window = getattr(config, "sliding_window", None)
    if window and "layer_types" not in config.to_dict():  # Mistral: a window in every layer
        kinds = ["sliding_attention"] * layers
    tokens = [min(context, window) if window and kind == "sliding_attention" else context for kind in kinds]
    # Recurrent and convolutional layers keep a state, whatever the context.
    tokens = [0 if kind.startswith("linear") or kind in STATEFUL else n for kind, n in zip(kinds, tokens)]
    if borrowing := getattr(config, "num_kv_shared_layers", 0):  # the last ones read keys and values of earlier ones
        tokens[-borrowing:] = [0] * borrowing
    return [2 * head_dim(config) * CACHE_BYTES * count for count in tokens]
