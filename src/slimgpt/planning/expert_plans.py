"""Plans of a mixture in which part of what routed experts lose goes as whole experts, equally many in every layer."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

from slimgpt.config import PruneConfig
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.families.moe import EXPERTS
from slimgpt.models.parameter_counts import LayerShape, ModelShape
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.alignment import EQUAL_TOLERANCE
from slimgpt.planning.allocation import MAX_FFN_REMOVED
from slimgpt.planning.budget import ParameterBudget, adjust_to_target
from slimgpt.planning.ffn import nearest, step_of, tied_to, widths_of
from slimgpt.planning.plan import TOLERANCE, Plan, plan_of_widths, removed_from_all, removed_parameters
from slimgpt.runtime.setting_checks import AUTO


def with_whole_experts(
    plan: Plan,
    shape: ModelShape,
    config: PruneConfig,
    model_config: PreTrainedConfig,
    share: float,
    *,
    routed_only: bool = False,
) -> Plan | None:
    """A plan that removes as much as another, with whole experts in place of channels; ``None`` if there is none.

    Every layer of experts loses the same number of whole ones, rounded down, and channels of those that stay make up
    the rest: in the proportions of the given plan, or equal shares where nothing else is removed. Equal layers stay
    equal, and such that a stock class holds them.

    Args:
        plan: the parameters to remove, and what heads, shared experts and dense layers lose.
        model_config: of the dense model.
        share: of the parameters that the routed experts lose, in (0, 1].
        routed_only: whether only routed experts lose anything; heads that a limit of the KV cache takes go all the
            same.
    """
    layers = [_base(layer, sizes, config, routed_only) for layer, sizes in zip(shape.layers, plan.layers, strict=True)]
    sparse = [index for index, layer in enumerate(shape.layers) if _routed_units(layer)]
    target = plan.parameters_before - plan.parameters
    gone = _experts_gone(shape, sparse, share * (target - removed_from_all(shape, layers))) if sparse else 0
    if gone <= 0:
        return None
    for index in sparse:
        layers[index] = {**layers[index], EXPERTS: layers[index][EXPERTS] - gone}
    if config.uniform:
        return _equal(plan, shape, config, model_config, layers[0])
    lost = {index: shape.layers[index].sizes[CHANNELS] - plan.layers[index][CHANNELS] for index in sparse}
    if routed_only or not any(lost.values()):
        lost = {index: shape.layers[index].sizes[CHANNELS] for index in sparse}
    # So that widths that stay as they are count as multiples of the step, too.
    step = math.gcd(plan.round_to, *(shape.layers[index].sizes[CHANNELS] for index in sparse))
    each = sum(count * shape.layers[index].channel_parameters(layers[index]) for index, count in lost.items())
    factor = (target - removed_from_all(shape, layers)) / each
    for index, count in lost.items():
        layer = shape.layers[index]
        width = nearest(widths_of(layer.sizes[CHANNELS], step_of(layer, step)), layer.sizes[CHANNELS] - factor * count)
        layers[index] = tied_to(layer, {**layers[index], CHANNELS: width})
    adjust_to_target(shape, layers, step, ParameterBudget(shape, target), _routed_units)
    if any(layers[i][CHANNELS] < (1 - MAX_FFN_REMOVED) * shape.layers[i].sizes[CHANNELS] for i in sparse):
        return None
    made = plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio, round_to=step)
    return made if made.achieved >= plan.achieved - (0 if _limited(config) else TOLERANCE) else None


def _limited(config: PruneConfig) -> bool:
    """Whether the size asked for must not be exceeded."""
    return config.param_limit is not None or config.byte_limit is not None


def _routed_units(layer: LayerShape) -> list[str]:
    return ["ffn"] if layer.experts is not None and layer.has_ffn else []


def _base(layer: LayerShape, sizes: dict[str, int], config: PruneConfig, routed_only: bool) -> dict[str, int]:
    """The sizes of a layer whose routed experts have lost nothing yet."""
    if not routed_only:
        kept = {name: layer.sizes[name] for name in (EXPERTS, CHANNELS) if _routed_units(layer)}
        return tied_to(layer, {**sizes, **kept})
    heads = {name: sizes[name] for name in (HEADS, KV_HEADS) if config.kv_cache is not None}
    return {**layer.sizes, **heads}


def _experts_gone(shape: ModelShape, sparse: list[int], loss: float) -> int:
    """Number of experts that every layer loses, so that they do not take more than ``loss`` parameters together."""
    layers = [shape.layers[index] for index in sparse]
    bounds = [(layer.sizes[EXPERTS], layer.experts) for layer in layers if layer.experts is not None]
    step = math.lcm(*(bound.groups for _, bound in bounds))
    most = min(experts - bound.least for experts, bound in bounds)
    return min(int(loss / sum(layer.unit_parameters["expert"] for layer in layers)), most) // step * step


def _equal(
    plan: Plan, shape: ModelShape, config: PruneConfig, model_config: PreTrainedConfig, sizes: dict[str, int]
) -> Plan | None:
    """Equal layers with so many experts; the step of widths is halved, unless it was given, until the target is met."""
    first, size = shape.layers[0], shape.layers[0].sizes[CHANNELS]
    target = plan.ratio * first.parameters
    rest, each = target - removed_parameters(first, sizes), first.channel_parameters(sizes)
    tolerance = max(EQUAL_TOLERANCE, abs(plan.achieved - plan.ratio))
    step = math.gcd(plan.round_to, size)
    while step:
        widths = widths_of(size, step_of(first, step))
        width = nearest(widths, size - rest / each)
        if _limited(config) and width > size - rest / each:
            width -= widths.step
        if width >= max((1 - MAX_FFN_REMOVED) * size, 1):
            layer = tied_to(first, {**sizes, CHANNELS: width})
            near = abs(removed_parameters(first, layer) - target) <= tolerance * first.parameters
            if near and stock_config(model_config, layer) is not None:
                layers = [dict(layer) for _ in shape.layers]
                return plan_of_widths(shape, layers, plan.head_unit, ratio=plan.ratio, round_to=step)
        step = step // 2 if config.round_to == AUTO and step_of(first, step // 2 or 1) < widths.step else 0
    return None
