"""From a ratio to the widths of every layer, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from slimgpt.errors import PlanError
from slimgpt.models.architectures import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.heterogeneous import lookup
from slimgpt.models.shape import LayerShape, ModelShape, describe
from slimgpt.models.stock import stock_config
from slimgpt.planning.feedforward import check_experts, ffn_sizes, least_ffn, step_of, tied_to
from slimgpt.planning.ratios import DEFAULT_RATIO, layer_ratios
from slimgpt.planning.targets import CacheTarget, kv_heads_for

HEAD_UNITS = ("auto", "kv", "query")
TOLERANCE = 0.002
"""How far the achieved share may be from the one asked for, wherever the units allow."""


@dataclass(frozen=True)
class Plan:
    """The widths that a pruned model will have.

    Args:
        head_unit: ``kv`` (whole KV heads with their query heads) or ``query`` (query heads, equally many from
            every KV group).
        layers: for every layer its ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size``.
        ratios: the share of its parameters that every layer was asked to lose.
        ratio: the share of the decoder layers' parameters that was asked for.
        achieved: the share that these widths remove.
        parameters: parameters of the whole model after pruning.
        parameters_before: the same before.
    """

    head_unit: str
    layers: tuple[dict[str, int], ...]
    ratios: tuple[float, ...]
    ratio: float
    achieved: float
    parameters: int
    parameters_before: int

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return all(layer == self.layers[0] for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


def make_plan(
    config: PreTrainedConfig,
    ratio: float | None = None,
    schedule: str | Sequence[float] | None = None,
    head_unit: str = "auto",
    round_to: int = 1,
    uniform: bool = False,
    shape: ModelShape | None = None,
    limit: int | None = None,
    cache: CacheTarget | None = None,
    whole_experts: float = 0.0,
) -> Plan:
    """Plan widths so that the share of removed decoder parameters is the one asked for.

    Heads are removed in whole units, at least one stays in every layer, and FFN channels make up what heads
    cannot express; the remainder of one layer is carried to the next.

    Args:
        config: the model's config; no weight is read.
        ratio: the share of the decoder layers' parameters to remove, in (0, 1); 0.2 if neither it nor a target is
            given.
        schedule: see :func:`slimgpt.planning.ratios.layer_ratios`; ``log_increase`` if not given.
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
        ratios = [r * wanted / target for r in ratios]
        target = wanted
    if head_unit == "auto":
        head_unit = _natural_unit(shape)
    if uniform:
        layers = _uniform(config, shape, target, head_unit, round_to, kv_heads, whole_experts)
    else:
        layers = _per_layer(shape, ratios, head_unit, round_to, kv_heads, whole_experts)
    if limit is not None:
        layers = _trim(shape, layers, limit, round_to, uniform)
    return plan_of_widths(shape, layers, head_unit, ratios, target / total)


def plan_of_widths(
    shape: ModelShape,
    layers: list[dict[str, int]],
    head_unit: str,
    ratios: Sequence[float] | None = None,
    ratio: float | None = None,
) -> Plan:
    """The plan of given widths.

    Args:
        layers: the widths of every layer.
        ratios: what was asked of each layer; what the widths make if not given.
        ratio: what was asked of all.

    Raises:
        PlanError: another number of layers, a width outside what the dense layer has, or heads that are removed in
            another unit than ``head_unit``.
    """
    if head_unit not in ("kv", "query"):
        raise PlanError(f"head unit '{head_unit}' is unknown; a plan names kv or query")
    if len(layers) != len(shape.layers):
        raise PlanError(f"the plan has {len(layers)} layers, the model {len(shape.layers)}")
    for index, (layer, sizes) in enumerate(zip(shape.layers, layers)):
        for field, value in sizes.items():
            if not 1 <= value <= layer.sizes[field]:
                raise PlanError(f"layer {index}: {field} = {value} is outside 1..{layer.sizes[field]}")
        if (problem := check_experts(layer, sizes)) is not None:
            raise PlanError(f"layer {index}: {problem}")
        if sizes[HEADS] != layer.sizes[HEADS] and head_unit not in layer.unit_parameters:
            raise PlanError(f"layer {index}: heads of this family cannot be removed by '{head_unit}'")
        kept = KV_HEADS if head_unit == "query" else None
        group = layer.sizes[HEADS] // layer.sizes[KV_HEADS]
        if kept and sizes[kept] != layer.sizes[kept]:
            raise PlanError(f"layer {index}: head_unit 'query' keeps all KV heads, and {sizes[kept]} are left")
        if kept and sizes[HEADS] % sizes[kept]:
            raise PlanError(f"layer {index}: its query heads do not divide among {sizes[kept]} KV heads")
        if not kept and sizes[HEADS] != group * sizes[KV_HEADS]:
            raise PlanError(f"layer {index}: head_unit 'kv' keeps {group} query heads on each of its KV heads")
    losses = [removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers)]
    achieved = sum(losses) / shape.layer_parameters
    return Plan(
        head_unit=head_unit,
        layers=tuple(layers),
        ratios=tuple(ratios or (loss / layer.parameters for loss, layer in zip(losses, shape.layers))),
        ratio=achieved if ratio is None else ratio,
        achieved=achieved,
        parameters=shape.parameters - sum(losses),
        parameters_before=shape.parameters,
    )


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


def _trim(
    shape: ModelShape, layers: list[dict[str, int]], limit: int, round_to: int, uniform: bool
) -> list[dict[str, int]]:
    """Take single steps off the widest FFNs until the limit holds, then give back what it has room for."""
    layers = [dict(layer) for layer in layers]

    def parameters() -> int:
        return shape.parameters - sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers))

    everything = range(len(layers))
    steps_of = [step_of(layer, round_to) for layer in shape.layers]
    while (over := parameters() - limit) > 0:
        widest = max(everything, key=lambda i: (layers[i][CHANNELS], i))
        chosen = list(everything) if uniform else [widest]
        step = sum(steps_of[i] * shape.layers[i].channel_parameters(layers[i]) for i in chosen)
        steps = -(-over // step) if uniform else 1
        for i in chosen:
            layers[i] = tied_to(shape.layers[i], {**layers[i], CHANNELS: layers[i][CHANNELS] - steps * steps_of[i]})
            if layers[i][CHANNELS] < steps_of[i]:
                raise PlanError(f"{limit:,} parameters cannot be reached with heads and FFN widths of these units")
    room = True
    while room:
        room = False
        groups = [list(everything)] if uniform else [[i] for i in reversed(everything)]
        for chosen in groups:
            cost = sum(steps_of[i] * shape.layers[i].channel_parameters(layers[i]) for i in chosen)
            fits = all(layers[i][CHANNELS] + steps_of[i] <= shape.layers[i].sizes[CHANNELS] for i in chosen)
            if fits and parameters() + cost <= limit:
                for i in chosen:
                    layers[i] = tied_to(shape.layers[i], {**layers[i], CHANNELS: layers[i][CHANNELS] + steps_of[i]})
                room = True
                break
    return layers


def _finish(config: PreTrainedConfig, shape: ModelShape, kv_heads: list[int], round_to: int, uniform: bool) -> Plan:
    """A plan that removes KV heads and nothing else but what ``round_to`` asks for."""
    layers = []
    for layer, heads in zip(shape.layers, kv_heads):
        step = step_of(layer, round_to)
        width = layer.sizes[CHANNELS] // step * step
        layers.append(with_heads(layer, "kv", heads, tied_to(layer, {CHANNELS: width})))
    if all(sizes == layer.sizes for layer, sizes in zip(shape.layers, layers)):
        raise PlanError("the KV cache of the model as it is fits already; there is nothing to remove")
    if uniform and stock_config(config, layers[0]) is None:
        raise PlanError(f"no stock class of transformers holds {kv_heads[0]} KV heads per layer; leave out --uniform")
    return plan_of_widths(shape, layers, "kv")


def check_heads(config: PreTrainedConfig, shape: ModelShape, head_unit: str, cache: CacheTarget | None = None) -> None:
    """Refuse a unit of heads that the family has not.

    Raises:
        PlanError: with the reason.
    """
    wanted = "kv" if cache is not None else head_unit
    if wanted == "auto" or any(wanted in layer.unit_parameters for layer in shape.layers):
        return
    architecture = lookup(config)
    there = sorted({unit for layer in shape.layers for unit in layer.unit_parameters if unit in ("kv", "query")})
    reason = architecture.refused.get("heads") if architecture is not None else None
    if reason is not None:
        raise PlanError(f"heads of '{config.model_type}' cannot be removed: {reason}")
    raise PlanError(
        f"heads of '{config.model_type}' cannot be removed by '{wanted}'; choose {', '.join(there) or 'no head unit'}"
    )


def _natural_unit(shape: ModelShape) -> str:
    """Query heads where several share a KV head in every layer that has heads, else whole heads."""
    with_heads = [layer for layer in shape.layers if {"kv", "query"} & set(layer.unit_parameters)]
    grouped = all(
        layer.sizes[HEADS] > layer.sizes[KV_HEADS] and "query" in layer.unit_parameters for layer in with_heads
    )
    return "query" if grouped and with_heads else "kv"


def _removable(layer: LayerShape, head_unit: str) -> int:
    """How many units of heads a layer has; 1, which stays, where it has none that can go."""
    return head_units(layer.sizes, head_unit) if head_unit in layer.unit_parameters else 1


def head_units(sizes: dict[str, int], head_unit: str) -> int:
    """How many removable units of heads a layer has: KV heads, or query heads per KV head."""
    if head_unit == "kv":
        return sizes[KV_HEADS]
    return sizes[HEADS] // sizes[KV_HEADS]


def removed_parameters(layer: LayerShape, sizes: dict[str, int]) -> int:
    """The parameters that a layer loses when it gets these widths."""
    lost = {field: layer.sizes[field] - sizes[field] for field in sizes}
    kv = layer.sizes[KV_HEADS]
    # A `query` unit is one query head on every KV head, a `kv` unit a KV head with all its query heads.
    per_query = layer.unit_parameters.get("query", 0) // kv
    per_kv = layer.unit_parameters.get("kv", 0) - per_query * (layer.sizes[HEADS] // kv)
    return lost[HEADS] * per_query + lost[KV_HEADS] * per_kv + layer.removed_from_ffn(sizes)


def with_heads(layer: LayerShape, head_unit: str, heads: int, ffn: dict[str, int]) -> dict[str, int]:
    """The sizes of a layer with so many units of heads and these sizes of its FFN."""
    sizes = {**layer.sizes, **ffn}
    if head_unit not in layer.unit_parameters:
        return sizes
    group = sizes[HEADS] // sizes[KV_HEADS]
    kv = heads if head_unit == "kv" else sizes[KV_HEADS]
    queries = heads * (group if head_unit == "kv" else kv)
    return {**sizes, HEADS: queries, KV_HEADS: kv}


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
        if size < round_to:
            raise PlanError(f"layer {i} has {size} FFN channels, fewer than --round-to {round_to} (--for may set it)")
        most = layer.removed_from_ffn({**layer.sizes, **least_ffn(layer, round_to, whole_experts)})
        largest = (units - 1) * per_head + most
        if target > largest + TOLERANCE * layer.parameters:
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
        raise PlanError("the layers of this model differ in width already; prune the dense model with --uniform")
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
