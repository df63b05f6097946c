"""Plans with whole attentions gone that are worth a trial: the loss of one says little of that of many."""

from __future__ import annotations

from collections.abc import Callable, Collection

from transformers import PreTrainedConfig

from slimgpt.models.architecture import HEADS, KV_HEADS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.allocation import ATTENTION, Sensitivity
from slimgpt.planning.budget import adjust_to_target, parameters_of
from slimgpt.planning.plan import Plan, plan_of_widths, with_heads
from slimgpt.planning.targets import CacheTarget, cache_bytes, kv_heads_for

Cheapest = Callable[[Plan, Sensitivity], Plan]
"""The plan of least measured cost that removes as much as a given one."""


def plans_without_attention(
    plan: Plan,
    shape: ModelShape,
    costs: Sensitivity,
    cheapest: Cheapest,
    config: PreTrainedConfig,
    cache: CacheTarget | None,
) -> list[Plan]:
    """The plan with whole attentions gone, and that with the cheaper half of these; none if none shall go.

    By parameters those go that cost least per parameter. Where the KV cache has a limit, so many of the cheapest go
    that the others may keep all their KV heads.

    Args:
        plan: what is to be removed, with all attentions.
        costs: of heads and channels, and of whole attentions.
        config: the dense model's.
        cache: the limit of the KV cache.
    """
    single = {each.layer: each.cost for each in costs.contributions if each.unit == ATTENTION}
    order = sorted(single, key=single.__getitem__)
    if cache is None:
        whole = cheapest(plan, costs)
        gone = [layer for layer in order if not whole.layers[layer][HEADS]]
    else:
        gone = order[: _needed(shape, order, config, cache)]
    chosen = [gone, gone[: len(gone) // 2]] if len(gone) > 1 else [gone] if gone else []
    if cache is None:
        return [cheapest(plan, costs.without_attention(layers)) for layers in chosen]
    rest = costs.without_attention()
    return [cheapest(_within(plan, shape, layers, config, cache), rest) for layers in chosen]


def _needed(shape: ModelShape, order: list[int], config: PreTrainedConfig, cache: CacheTarget) -> int:
    """Number of layers that must lose their attention for the cache to fit while the others keep their KV heads."""
    heads = [layer.sizes[KV_HEADS] for layer in shape.layers]
    for count, layer in enumerate(order):
        if cache_bytes(config, heads, cache.context) <= cache.bytes:
            return count
        heads[layer] = 0
    return len(order)


def _within(plan: Plan, shape: ModelShape, gone: Collection[int], config: PreTrainedConfig, cache: CacheTarget) -> Plan:
    """The plan with some attentions gone, and as many KV heads in the others as the cache then has room for."""
    kv_heads = kv_heads_for(config, shape, cache, False, without=gone)
    layers = [
        with_heads(layer, plan.head_unit, heads, {name: value for name, value in sizes.items() if "heads" not in name})
        for layer, sizes, heads in zip(shape.layers, plan.layers, kv_heads, strict=True)
    ]
    adjust_to_target(shape, layers, plan.round_to, parameters_of(plan, shape))
    return plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio, round_to=plan.round_to)
