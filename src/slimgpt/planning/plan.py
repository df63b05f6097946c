"""From a ratio to the widths of every layer, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimgpt.errors import PlanError
from slimgpt.models.architecture import HEADS, KV_HEADS, is_uniform
from slimgpt.models.parameter_counts import LayerShape, ModelShape
from slimgpt.planning.ffn import check_experts

UNITS_OF_HEADS = ("kv", "query")
HEAD_UNITS = ("auto", *UNITS_OF_HEADS)
TOLERANCE = 0.002
"""How far the achieved share may be from the one asked for, wherever the units allow."""


@dataclass(frozen=True)
class Plan:
    """The widths that a pruned model will have.

    Args:
        head_unit: ``kv`` (whole KV heads with their query heads) or ``query`` (query heads, equally many from
            every KV group).
        layers: for every layer its ``num_attention_heads``, ``num_key_value_heads`` and ``intermediate_size``; one
            without attention has 0 heads of both kinds.
        ratios: the share of its parameters that every layer was asked to lose.
        ratio: the share of the decoder layers' parameters that was asked for.
        achieved: the share that these widths remove.
        parameters: parameters of the whole model after pruning.
        parameters_before: the same before.
        round_to: every FFN width that was chosen is a multiple of it.
    """

    head_unit: str
    layers: tuple[dict[str, int], ...]
    ratios: tuple[float, ...]
    ratio: float
    achieved: float
    parameters: int
    parameters_before: int
    round_to: int = 1

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return is_uniform(self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


def plan_of_widths(
    shape: ModelShape,
    layers: list[dict[str, int]],
    head_unit: str,
    ratios: Sequence[float] | None = None,
    ratio: float | None = None,
    *,
    round_to: int = 1,
) -> Plan:
    """The plan of given widths.

    Args:
        layers: the widths of every layer.
        ratios: what was asked of each layer; what the widths make if not given.
        ratio: what was asked of all.
        round_to: the step that the FFN widths were chosen with.

    Raises:
        PlanError: another number of layers, a width outside what the dense layer has, or heads that are removed in
            another unit than ``head_unit``.
    """
    if head_unit not in UNITS_OF_HEADS:
        raise PlanError(f"head unit '{head_unit}' is unknown; a plan names kv or query")
    if len(layers) != len(shape.layers):
        raise PlanError(f"the plan has {len(layers)} layers, the model {len(shape.layers)}")
    for index, (layer, sizes) in enumerate(zip(shape.layers, layers)):
        if not sizes[HEADS] and not sizes[KV_HEADS] and layer.sizes[HEADS]:
            if not layer.attention_parameters:
                raise PlanError(
                    f"layer {index} must keep its attention: the family cannot do without, or the layer is the first "
                    "of its kind, on which masks and caches depend"
                )
            sizes = {**sizes, HEADS: layer.sizes[HEADS], KV_HEADS: layer.sizes[KV_HEADS]}  # nothing more to check
        for field, value in sizes.items():
            if not min(1, layer.sizes[field]) <= value <= layer.sizes[field]:
                raise PlanError(f"layer {index}: {field} = {value} is outside 1..{layer.sizes[field]}")
        if (problem := check_experts(layer, sizes)) is not None:
            raise PlanError(f"layer {index}: {problem}")
        if sizes[HEADS] != layer.sizes[HEADS] and head_unit not in layer.unit_parameters:
            raise PlanError(f"layer {index}: heads of this family cannot be removed by '{head_unit}'")
        kept = KV_HEADS if head_unit == "query" else None
        if not layer.sizes[HEADS]:
            continue
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
        round_to=round_to,
    )


def head_units(sizes: dict[str, int], head_unit: str) -> int:
    """Number of removable units of heads in a layer: KV heads, or query heads per KV head."""
    if head_unit == "kv" or not sizes[KV_HEADS]:
        return sizes[KV_HEADS]
    return sizes[HEADS] // sizes[KV_HEADS]


def removed_from_all(shape: ModelShape, layers: Sequence[dict[str, int]]) -> int:
    """The parameters that all layers lose when they get these widths."""
    return sum(removed_parameters(layer, sizes) for layer, sizes in zip(shape.layers, layers))


def removed_parameters(layer: LayerShape, sizes: dict[str, int]) -> int:
    """The parameters that a layer loses when it gets these widths."""
    lost = {field: layer.sizes[field] - sizes[field] for field in sizes}
    kv = layer.sizes[KV_HEADS]
    if not sizes[HEADS]:
        return (layer.attention_parameters if kv else 0) + layer.removed_from_ffn(sizes)
    # A `query` unit is one query head on every KV head, a `kv` unit a KV head with all its query heads.
    per_query = layer.unit_parameters.get("query", 0) // kv
    per_kv = layer.unit_parameters.get("kv", 0) - per_query * (layer.sizes[HEADS] // kv)
    return lost[HEADS] * per_query + lost[KV_HEADS] * per_kv + layer.removed_from_ffn(sizes)


def with_heads(layer: LayerShape, head_unit: str, heads: int, ffn: dict[str, int]) -> dict[str, int]:
    """The sizes of a layer with so many units of heads and these sizes of its FFN; 0 units: without attention."""
    sizes = {**layer.sizes, **ffn}
    if not heads and layer.attention_parameters:
        return {**sizes, HEADS: 0, KV_HEADS: 0}
    if head_unit not in layer.unit_parameters:
        return sizes
    group = sizes[HEADS] // sizes[KV_HEADS]
    kv = heads if head_unit == "kv" else sizes[KV_HEADS]
    queries = heads * (group if head_unit == "kv" else kv)
    return {**sizes, HEADS: queries, KV_HEADS: kv}
