"""Gemma 4: some models have experts beside the FFN, and the small ones layers that read more than hidden states."""

from __future__ import annotations

from typing import Any

from slimgpt.models.architecture import Architecture, Shares
from slimgpt.models.families.dense import gated, in_module
from slimgpt.models.families.moe import Mixture, experts, shared_expert

BY_KIND = "the number of its heads, or their size, depends on the kind of attention of a layer"
_BOTH = (
    "it has experts beside layers that attend to keys and values of others, or read embeddings of the tokens; nobody "
    "has described a model with both"
)


def _left_states(config: Any) -> list[str | None]:
    """The kind of attention of the last layer of every kind in front of those that only read."""
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    last = {kind: index for index, kind in enumerate(own)}
    return [kind if last.get(kind) == index else None for index, kind in enumerate(config.layer_types)]


def _twice_where_borrowed(config: Any, index: int) -> int:
    borrowed = index >= config.num_hidden_layers - config.num_kv_shared_layers
    return 2 if config.use_double_wide_mlp and borrowed else 1


_SHARED_KV = Shares("shared_kv_states", _left_states)


def gemma4(config: Any) -> Architecture | str:
    """A dense FFN, and in some models experts beside it; in the small ones (E2B, E4B) every layer reads an embedding of
    the tokens, and the last ones keys and values of earlier ones."""
    size = "hidden_size_per_layer_input"
    embedded, borrowing = getattr(config, size, 0), config.num_kv_shared_layers
    varying, refused = frozenset(("head_dim", "num_key_value_heads")), {"heads": BY_KIND}
    if not getattr(config, "enable_moe_block", False):
        return Architecture(
            (gated("mlp"),),
            refused=refused,
            varying=varying,
            by_batch={"per_layer_input": size} if embedded else {},
            shares=_SHARED_KV if borrowing else None,
            times_ffn=_twice_where_borrowed if config.use_double_wide_mlp else None,
            with_widths={"use_double_wide_mlp": False} if config.use_double_wide_mlp else {},
        )
    if embedded or borrowing:
        return _BOTH
    return Mixture(
        (
            shared_expert(*in_module("mlp", "down_proj", "gate_proj", "up_proj")),
            experts("experts", "router.proj", "router.per_expert_scale"),
        ),
        shared="intermediate_size",
        per_token="top_k_experts",
        refused=refused,
        varying=varying,
    )
