"""Removal of a number of parameters from a layer's FFN, or from its experts: whole experts, then channels."""

from __future__ import annotations

import math

from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS, Sizes
from slimgpt.models.families.moe import EXPERTS, SHARED
from slimgpt.models.parameter_counts import LayerShape

EXPERT_STEP = 8
"""transformers multiplies all experts at once by a kernel that wants rows of a multiple of 16 bytes. Where the dense
model's are not, it does not run in 16 bits; its widths keep what alignment they have, which may do in 32."""

FIELDS = {"ffn": CHANNELS, "shared": SHARED}
"""The size that a unit of an FFN counts."""


def step_of(layer: LayerShape, round_to: int) -> int:
    """The number that the width of the layer's FFN shall be a multiple of.

    Args:
        round_to: what the user asks for.
    """
    if layer.experts is None:
        return round_to
    return math.lcm(round_to, math.gcd(layer.sizes[CHANNELS], EXPERT_STEP))


def free_units(layer: LayerShape) -> list[str]:
    """The units of a layer's FFN whose widths can be chosen: channels (of all experts at once, in a mixture), and those
    of a shared expert of its own width."""
    own = layer.experts is not None and not layer.experts.tied and SHARED in layer.sizes
    return [*(["ffn"] if layer.has_ffn else []), *(["shared"] if own else [])]


def step_of_unit(layer: LayerShape, unit: str, round_to: int) -> int:
    """The number that a width is a multiple of."""
    return step_of(layer, round_to) if unit == "ffn" else min(round_to, layer.sizes[SHARED])


def step_parameters(layer: LayerShape, unit: str, sizes: Sizes) -> int:
    """The parameters that go with one channel of a unit once the layer has so many experts."""
    return layer.channel_parameters(sizes) if unit == "ffn" else layer.unit_parameters[unit]


def widths_of(size: int, round_to: int) -> range:
    """The widths an FFN of this size may get: multiples of ``round_to``; itself only if it is one."""
    return range(round_to, size + 1, round_to)


def nearest(widths: range, width: float) -> int:
    """The member of ``widths`` nearest to ``width``."""
    steps = round((width - widths[0]) / widths.step)
    return widths[min(max(steps, 0), len(widths) - 1)]


def tied_to(layer: LayerShape, sizes: dict[str, int]) -> dict[str, int]:
    """The sizes with the width of a shared expert that follows the others'."""
    tied = layer.experts.tied if layer.experts is not None else 0
    return {**sizes, SHARED: tied * sizes[CHANNELS]} if tied else sizes


def ffn_sizes(layer: LayerShape, loss: float, round_to: int, whole_experts: float = 0.0) -> dict[str, int]:
    """The sizes of an FFN that lose the number of parameters nearest to ``loss``.

    Whole experts are taken as long as they do not lose more than their share; then the shared expert, where its width
    is its own, and the channels of the experts that are left lose equal shares of theirs.

    Args:
        loss: parameters to lose.
        round_to: widths become multiples of it.
        whole_experts: the share of the loss that whole experts take, in [0, 1].

    Raises:
        PlanError: an FFN narrower than ``round_to``.
    """
    size = layer.sizes[CHANNELS]
    if not layer.has_ffn:
        return {CHANNELS: size}
    widths = widths_of(size, step_of(layer, round_to))
    if not widths:
        raise PlanError(f"an FFN has {size} channels, fewer than {step_of(layer, round_to)}, the step that it needs")
    sizes = {CHANNELS: size}
    if layer.experts is None:
        return {CHANNELS: nearest(widths, size - loss / layer.unit_parameters["ffn"])}
    bounds, units = layer.experts, layer.unit_parameters
    groups = int(max(loss, 0.0) * whole_experts / (units["expert"] * bounds.groups))
    gone = min(groups * bounds.groups, layer.sizes[EXPERTS] - bounds.least)
    sizes[EXPERTS] = layer.sizes[EXPERTS] - gone
    loss -= gone * units["expert"]
    if SHARED in layer.sizes:
        sizes[SHARED] = layer.sizes[SHARED]
        if not bounds.tied:
            left = sizes[EXPERTS] * size * units["channel"] + sizes[SHARED] * units["shared"]
            own = widths_of(sizes[SHARED], min(round_to, sizes[SHARED]))
            sizes[SHARED] = nearest(own, sizes[SHARED] * (1 - loss / left))
            loss -= (layer.sizes[SHARED] - sizes[SHARED]) * units["shared"]
    sizes[CHANNELS] = nearest(widths, size - loss / layer.channel_parameters(sizes))
    return tied_to(layer, sizes)


def least_ffn(layer: LayerShape, round_to: int, whole_experts: float = 0.0) -> dict[str, int]:
    """The smallest sizes that the FFN of a layer may get."""
    sizes = {CHANNELS: step_of(layer, round_to) if layer.has_ffn else layer.sizes[CHANNELS]}
    if layer.experts is not None:
        sizes[EXPERTS] = layer.experts.least if whole_experts else layer.sizes[EXPERTS]
        if SHARED in layer.sizes:
            sizes[SHARED] = min(round_to, layer.sizes[SHARED])
    return tied_to(layer, sizes)


def check_experts(layer: LayerShape, sizes: dict[str, int]) -> str | None:
    """Why a layer cannot have these experts; ``None`` if it can."""
    if layer.experts is None:
        return None
    least, groups = layer.experts.least, layer.experts.groups
    if sizes[EXPERTS] < least:
        return f"{sizes[EXPERTS]} experts are fewer than the {least} that the router needs"
    if sizes[CHANNELS] % (step := step_of(layer, 1)):
        return f"{CHANNELS} = {sizes[CHANNELS]} is no multiple of {step}, which experts need"
    if sizes[EXPERTS] % groups:
        return f"{sizes[EXPERTS]} experts do not divide among {groups} groups"
    if tied_to(layer, sizes) != sizes:
        return f"the shared expert is {layer.experts.tied} times as wide as the others"
    return None
