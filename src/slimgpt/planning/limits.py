"""Widths within a limit of parameters, which a ratio alone meets only about."""

from __future__ import annotations

from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.ffn import step_of, tied_to
from slimgpt.planning.plan import head_units, removed_from_all, with_heads


def within_limit(
    shape: ModelShape, layers: list[dict[str, int]], limit: int, round_to: int, head_unit: str, *, uniform: bool
) -> list[dict[str, int]]:
    """Take single steps off the widest FFNs until the limit holds, then give back what it has room for.

    Where no FFN may be narrowed, heads go, one unit at a time.

    Args:
        layers: the widths of every layer, near the limit.
        limit: parameters that the whole model may have.
        uniform: whether all layers change together.

    Raises:
        PlanError: there is nothing left to take.
    """
    layers = [dict(layer) for layer in layers]

    def parameters() -> int:
        return shape.parameters - removed_from_all(shape, layers)

    with_ffn = [index for index, layer in enumerate(shape.layers) if layer.has_ffn]
    if not with_ffn:
        while parameters() > limit:
            _remove_head(shape, layers, limit, head_unit, uniform)
        return layers
    steps_of = [step_of(layer, round_to) for layer in shape.layers]
    while (over := parameters() - limit) > 0:
        widest = max(with_ffn, key=lambda i: (layers[i][CHANNELS], i))
        chosen = list(with_ffn) if uniform else [widest]
        step = sum(steps_of[i] * shape.layers[i].channel_parameters(layers[i]) for i in chosen)
        steps = -(-over // step) if uniform else 1
        for i in chosen:
            layers[i] = tied_to(shape.layers[i], {**layers[i], CHANNELS: layers[i][CHANNELS] - steps * steps_of[i]})
            if layers[i][CHANNELS] < steps_of[i]:
                raise PlanError(f"{limit:,} parameters cannot be reached with heads and FFN widths of these units")
    room = True
    while room:
        room = False
        groups = [list(with_ffn)] if uniform else [[i] for i in reversed(with_ffn)]
        for chosen in groups:
            cost = sum(steps_of[i] * shape.layers[i].channel_parameters(layers[i]) for i in chosen)
            fits = all(layers[i][CHANNELS] + steps_of[i] <= shape.layers[i].sizes[CHANNELS] for i in chosen)
            if fits and parameters() + cost <= limit:
                for i in chosen:
                    layers[i] = tied_to(shape.layers[i], {**layers[i], CHANNELS: layers[i][CHANNELS] + steps_of[i]})
                room = True
                break
    return layers


def _remove_head(shape: ModelShape, layers: list[dict[str, int]], limit: int, head_unit: str, uniform: bool) -> None:
    """Take a unit of heads off the layer with the largest share of them left, in place; the last such layer."""
    shares = {
        index: head_units(layers[index], head_unit) / head_units(layer.sizes, head_unit)
        for index, layer in enumerate(shape.layers)
        if head_unit in layer.unit_parameters and head_units(layers[index], head_unit) > 1
    }
    if uniform or not shares:
        change = "leave out uniform" if uniform else "ask for more, or leave out heads_only"
        raise PlanError(f"{limit:,} parameters cannot be reached by removing heads alone; {change}")
    index = max(shares, key=lambda i: (shares[i], i))
    layers[index] = with_heads(shape.layers[index], head_unit, head_units(layers[index], head_unit) - 1, {})
