"""From a target (ratio, parameters, bytes, KV cache) to a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from slimgpt.config import PruneConfig
from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.build import empty_model
from slimgpt.models.lookup import lookup
from slimgpt.models.parameter_counts import LayerShape, ModelShape, describe
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.alignment import aligned_plan
from slimgpt.planning.allocation import check_measurable
from slimgpt.planning.few_widths import in_few_widths
from slimgpt.planning.ffn import ffn_sizes, least_ffn, step_of, tied_to
from slimgpt.planning.limits import within_limit
from slimgpt.planning.plan import (
    HEAD_UNITS,
    TOLERANCE,
    UNITS_OF_HEADS,
    Plan,
    head_units,
    plan_of_widths,
    removed_parameters,
    with_heads,
)
from slimgpt.planning.plan_file import read_plan
from slimgpt.planning.schedules import DEFAULT_RATIO, layer_ratios
from slimgpt.planning.stock_forms import UNEQUAL
from slimgpt.planning.targets import kv_heads_for, parameters_for
from slimgpt.runtime.setting_relations import given_whole_experts
from slimgpt.runtime.units import CacheTarget


def make_plan(
    config: PreTrainedConfig,
    ratio: float | None = None,
    schedule: str | Sequence[float] | None = None,
    head_unit: str = "auto",
    round_to: int = 1,
    uniform: bool = False,
    *,
    shape: ModelShape | None = None,
    limit: int | None = None,
    cache: CacheTarget | None = None,
    whole_experts: float = 0.0,
    heads: bool = True,
) -> Plan:
    """Plan widths so that the share of removed decoder parameters is the one asked for.

    Heads are removed in whole units, at least one stays in every layer, and FFN channels make up what heads
    cannot express; the remainder of one layer is carried to the next.

    Args:
        config: the model's config; no weight is read.
        ratio: the share of the decoder layers' parameters to remove, in (0, 1); 0.2 if neither it nor a target is
            given.
        schedule: see :func:`slimgpt.planning.schedules.layer_ratios`; ``log_increase`` if not given.
        head_unit: ``auto`` takes query heads where several share a KV head, else whole heads.
        round_to: every ``intermediate_size`` becomes a multiple of it.
        uniform: the same widths in all layers, chosen so that a stock class can hold them.
        shape: the model's shape, if the caller has it already.
        limit: parameters that the whole model may have, in place of ``ratio``; met as nearly as the units allow and
            never exceeded.
        cache: what the KV cache may take; whole KV heads go until it fits. Without a ratio or a limit nothing else
            is removed.
        whole_experts: in a mixture, the share of what its experts lose that is taken as whole experts, in [0, 1]; the
            rest is channels of the experts that stay. In whole experts not more than the share, so that channels make
            up what is missing.
        heads: whether heads may be removed.

    Raises:
        PlanError: an argument outside its range, or a ratio that no widths can meet.
        UnsupportedFamilyError: the family is not in the table.
    """
    if head_unit not in HEAD_UNITS:
        raise PlanError(f"head unit '{head_unit}' is unknown; choose {', '.join(HEAD_UNITS)}")
    if round_to < 1:
        raise PlanError(f"round_to {round_to} is below 1; give the number that every FFN width shall be a multiple of")
    if uniform and schedule not in (None, "uniform"):
        raise PlanError(f"a uniform model cannot follow the schedule {schedule}; leave out one of the two")
    shape = shape or describe(config)
    check_heads(config, shape, head_unit, cache)
    if whole_experts and not any(layer.experts for layer in shape.layers):
        raise PlanError(f"'{config.model_type}' has no experts to remove; leave out --whole-experts")
    total = shape.layer_parameters
    if limit is not None:
        ratio = _ratio_for(shape, limit, ratio)
    kv_heads = None
    if cache is not None:
        if head_unit == "query":
            raise PlanError("a smaller KV cache needs whole KV heads removed; leave out --head-unit query")
        head_unit = "kv"
        kv_heads = kv_heads_for(config, shape, cache, uniform)
        if ratio is None and schedule is None:
            return _finish(config, shape, kv_heads, round_to, uniform)
    ratios = layer_ratios(schedule or ("uniform" if uniform else "log_increase"), len(shape.layers), ratio)
    target = sum(r * layer.parameters for r, layer in zip(ratios, shape.layers))
    if not isinstance(schedule, Sequence) or isinstance(schedule, str):
        # Layers of different size (a model pruned before) would shift the mean: scale it back.
        wanted = (DEFAULT_RATIO if ratio is None else ratio) * total
        ratios = _over_ffns(shape, [r * wanted / target for r in ratios], wanted)
        target = wanted
    if head_unit == "auto":
        head_unit = natural_unit(shape)
    if not heads and kv_heads is None:
        kv_heads = [_removable(layer, head_unit) for layer in shape.layers]
    if uniform:
        layers = _uniform(config, shape, target, head_unit, round_to, kv_heads, whole_experts)
    else:
        layers = _per_layer(shape, ratios, head_unit, round_to, kv_heads, whole_experts)
    if limit is not None:
        layers = within_limit(shape, layers, limit, round_to, head_unit, uniform=uniform)
    return plan_of_widths(shape, layers, head_unit, ratios, target / total, round_to=round_to)


def _ratio_for(shape: ModelShape, limit: int, ratio: float | None) -> float:
    """The ratio at which the whole model has ``limit`` parameters."""
    if ratio is not None:
        raise PlanError("a ratio and a target size were both given; leave out one of them")
    if limit >= shape.parameters:
        raise PlanError(f"the model has {shape.parameters:,} parameters already, no more than the {limit:,} asked for")
    if limit <= shape.other_parameters:
        raise PlanError(
            f"embeddings, head and norms alone have {shape.other_parameters:,} parameters, and they stay; "
            f"{limit:,} cannot be reached"
        )
    return (shape.parameters - limit) / shape.layer_parameters


def _finish(config: PreTrainedConfig, shape: ModelShape, kv_heads: list[int], round_to: int, uniform: bool) -> Plan:
    """A plan that removes KV heads and nothing else but what ``round_to`` asks for."""
    layers = []
    for layer, heads in zip(shape.layers, kv_heads):
        step = step_of(layer, round_to)
        width = layer.sizes[CHANNELS] // step * step if layer.has_ffn else layer.sizes[CHANNELS]
        layers.append(with_heads(layer, "kv", heads, tied_to(layer, {CHANNELS: width})))
    if all(sizes == layer.sizes for layer, sizes in zip(shape.layers, layers)):
        raise PlanError("the KV cache of the model as it is fits already; there is nothing to remove")
    if uniform and stock_config(config, layers[0]) is None:
        raise PlanError(f"no stock class of transformers holds {kv_heads[0]} KV heads per layer; leave out --uniform")
    return plan_of_widths(shape, layers, "kv", round_to=round_to)


def check_heads(config: PreTrainedConfig, shape: ModelShape, head_unit: str, cache: CacheTarget | None = None) -> None:
    """Refuse a unit of heads that the family has not.

    Raises:
        PlanError: with the reason.
    """
    unit = "kv" if cache is not None else head_unit
    if unit == "auto" or any(unit in layer.unit_parameters for layer in shape.layers):
        return
    architecture = lookup(config)
    units = sorted({name for layer in shape.layers for name in layer.unit_parameters if name in UNITS_OF_HEADS})
    reason = architecture.refused.get("heads") if architecture is not None else None
    if reason is not None:
        raise PlanError(f"heads of '{config.model_type}' cannot be removed: {reason}")
    raise PlanError(
        f"heads of '{config.model_type}' cannot be removed by '{unit}'; choose {', '.join(units) or 'no head unit'}"
    )


def head_unit_of(config: PruneConfig) -> str:
    """The unit of heads that the settings name; whole KV heads for the paper's methods, which publish it so."""
    return "kv" if config.head_unit == "auto" and config.method.startswith("paper") else config.head_unit


def natural_unit(shape: ModelShape) -> str:
    """Query heads where several share a KV head in every layer that has heads, else whole heads."""
    with_heads = [layer for layer in shape.layers if set(UNITS_OF_HEADS) & set(layer.unit_parameters)]
    grouped = all(
        layer.sizes[HEADS] > layer.sizes[KV_HEADS] and "query" in layer.unit_parameters for layer in with_heads
    )
    return "query" if grouped and with_heads else "kv"


def _removable(layer: LayerShape, head_unit: str) -> int:
    """Number of units of heads in a layer; 1, which stays, where none can go."""
    return head_units(layer.sizes, head_unit) if head_unit in layer.unit_parameters else 1


def _over_ffns(shape: ModelShape, ratios: list[float], wanted: float) -> list[float]:
    """The ratios once FFNs make up for what layers without one (of a hybrid) cannot lose.

    Args:
        wanted: parameters that all layers are to lose.
    """
    layers = list(zip(shape.layers, ratios))
    if all(layer.has_ffn for layer in shape.layers):
        return ratios
    heads = [ratio * layer.parameters if layer.unit_parameters else 0.0 for layer, ratio in layers]
    fixed = sum(lost for (layer, _), lost in zip(layers, heads) if not layer.has_ffn)
    rest = sum(ratio * layer.parameters for layer, ratio in layers if layer.has_ffn)
    scale = (wanted - fixed) / rest if rest else 1.0
    return [ratio * scale if layer.has_ffn else lost / layer.parameters for (layer, ratio), lost in zip(layers, heads)]


def _per_layer(
    shape: ModelShape,
    ratios: Sequence[float],
    head_unit: str,
    round_to: int,
    kv_heads: list[int] | None,
    whole_experts: float,
) -> list[dict[str, int]]:
    layers: list[dict[str, int]] = []
    carry = 0.0
    for i, (layer, r) in enumerate(zip(shape.layers, ratios)):
        if r == 0 and kv_heads is None:
            layers.append(dict(layer.sizes))
            continue
        target = r * layer.parameters
        units, size = _removable(layer, head_unit), layer.sizes[CHANNELS]
        per_head = layer.unit_parameters.get(head_unit, 1)
        if layer.has_ffn and size < round_to:
            raise PlanError(f"layer {i} has {size} FFN channels, fewer than --round-to {round_to} (--for may set it)")
        most = layer.removed_from_ffn({**layer.sizes, **least_ffn(layer, round_to, whole_experts)})
        largest = (units - 1) * per_head + most
        if layer.has_ffn and target > largest + TOLERANCE * layer.parameters:
            left = "" if head_unit not in layer.unit_parameters else f"1 of {units} head units and "
            least = step_of(layer, round_to)
            raise PlanError(
                f"layer {i} cannot lose {r:.1%} of its parameters: that would leave it without "
                f"{'a head or without ' if left else ''}an FFN; with {left}{least} of {size} channels left it "
                f"loses {largest / layer.parameters:.1%}. Ask for a smaller ratio or a flatter schedule"
            )
        if kv_heads is not None:  # given by the KV cache; the FFN makes up the rest
            heads = units - kv_heads[i]
        else:
            # As many heads as the ratio says, rounded; more where the FFN alone could not make up the rest.
            heads = round(units * r)
            enough = -(-(target - most) // per_head)
            heads = min(max(heads, int(enough), 0), units - 1)
            heads = min(heads, int(target // per_head)) if heads * per_head > target else heads
        rest = target + carry - heads * per_head
        ffn = ffn_sizes(layer, rest, round_to, whole_experts)
        carry = rest - layer.removed_from_ffn({**layer.sizes, **ffn})
        layers.append(with_heads(layer, head_unit, units - heads, ffn))
    return layers


def _uniform(
    config: PreTrainedConfig,
    shape: ModelShape,
    target: float,
    head_unit: str,
    round_to: int,
    kv_heads: list[int] | None,
    whole_experts: float,
) -> list[dict[str, int]]:
    """The best pair of widths for all layers: within the tolerance the most balanced one, else the nearest."""
    first = shape.layers[0]
    if any(layer.sizes != first.sizes for layer in shape.layers):
        raise PlanError(
            f"{UNEQUAL}; --uniform (--for may set it) is for a dense model of equal layers: leave out both; "
            "`slimgpt plan` then says which engines run layers that differ"
        )
    units, size = _removable(first, head_unit), first.sizes[CHANNELS]
    if size < round_to:
        raise PlanError(f"the FFN has {size} channels, fewer than --round-to {round_to} (--for may set it)")
    ratio = target / shape.layer_parameters
    per_layer = target / len(shape.layers)
    candidates = []
    for heads in range(1, units + 1) if kv_heads is None else [kv_heads[0]]:
        rest = per_layer - (units - heads) * first.unit_parameters.get(head_unit, 0)
        sizes = with_heads(first, head_unit, heads, ffn_sizes(first, rest, round_to, whole_experts))
        error = abs(removed_parameters(first, sizes) - per_layer) / first.parameters
        imbalance = abs((units - heads) / units - ratio)
        candidates.append(((0.0, imbalance) if error <= TOLERANCE else (error, imbalance), sizes))
    for key, sizes in sorted(candidates, key=lambda candidate: candidate[0]):
        if key[0] > 0.05 and kv_heads is None:
            break
        if stock_config(config, sizes) is not None:
            return [dict(sizes) for _ in shape.layers]
    raise PlanError(
        f"no uniform widths that a stock class of transformers can hold come near a ratio of {ratio:g}; "
        "leave out --uniform, or lower --round-to or the ratio"
    )


def plan_for(model_config: Any, config: PruneConfig, shape: ModelShape, dtype: torch.dtype | None = None) -> Plan:
    """The plan that the settings ask for.

    ``paper`` removes whole heads as published; the other methods take the finer unit where there is one.

    Args:
        dtype: of the weights on disk, for a target in bytes.

    Raises:
        PlanError: no widths can do what was asked for.
    """
    check_measurable(config, shape)
    if config.plan is not None:
        return read_plan(config.plan, model_config, shape)
    head_unit = head_unit_of(config)
    limit = config.param_limit
    if config.byte_limit is not None:
        itemsize = (dtype or model_config.dtype or torch.float32).itemsize
        tensors = len(empty_model(model_config).state_dict())
        limit = parameters_for(config.byte_limit, itemsize, tensors)

    def make(round_to: int) -> Plan:
        plan = make_plan(
            model_config,
            config.ratio,
            config.schedule,
            head_unit,
            round_to,
            config.uniform,
            shape=shape,
            limit=limit,
            cache=config.cache_target,
            whole_experts=given_whole_experts(config),
            heads=config.method != "reap",
        )
        return in_few_widths(plan, shape, config.num_widths, heads=config.cache_target is None)

    plan = aligned_plan(make, config, shape)
    if plan.parameters == shape.parameters:
        total = shape.layer_parameters
        least = min(min(layer.unit_parameters.values()) for layer in shape.layers if layer.unit_parameters)
        raise PlanError(
            f"a ratio of {plan.ratio:g} removes nothing: it is {plan.ratio * total:,.0f} of {total:,} parameters, and "
            f"the smallest unit that can go has {least:,}{' in every layer' if config.uniform else ''}; ask for a "
            "larger share"
        )
    return plan
