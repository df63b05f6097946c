"""Budget of a plan, and the share of every structure in it: the one place where a head, a channel or a
whole attention has a size. Parameters here; time in :mod:`slimgpt.planning.speed_table`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from slimgpt.models.architecture import Sizes
from slimgpt.models.parameter_counts import LayerShape, ModelShape
from slimgpt.planning.ffn import FIELDS, free_units, step_of_unit, tied_to
from slimgpt.planning.plan import Plan, head_units, removed_parameters


class Budget(Protocol):
    """The amount to be removed, and the amount that each structure counts.

    Attributes:
        target: at least so much is to go.
        total: what all decoder layers of the dense model count.
    """

    @property
    def target(self) -> float: ...

    @property
    def total(self) -> float: ...

    def of_structure(self, index: int, unit: str, keep: int) -> int:
        """The amount that goes when so many units of a layer's structure stay.

        Args:
            unit: ``ffn``, ``shared``, ``kv`` or ``query``.
            keep: 0 units of heads: the layer goes without attention.
        """
        ...

    def of_layer(self, index: int, sizes: Sizes) -> int:
        """The amount that goes when a layer gets these sizes."""
        ...

    def channels_for(self, index: int, amount: float) -> float:
        """The real number of FFN channels of a layer with which so much of it goes."""
        ...


def removed_by(budget: Budget, layers: Sequence[Sizes]) -> int:
    """The amount that goes when the layers get these sizes."""
    return sum(budget.of_layer(index, sizes) for index, sizes in enumerate(layers))


@dataclass(frozen=True)
class ParameterBudget:
    """A budget of parameters.

    Args:
        shape: the dense model.
        target: parameters that are to go.
    """

    shape: ModelShape
    target: float

    @property
    def total(self) -> float:
        return self.shape.layer_parameters

    def of_structure(self, index: int, unit: str, keep: int) -> int:
        layer = self.shape.layers[index]
        if unit in FIELDS:
            return (layer.sizes[FIELDS[unit]] - keep) * layer.unit_parameters[unit]
        if not keep and layer.attention_parameters:
            return layer.attention_parameters
        return (head_units(layer.sizes, unit) - keep) * layer.unit_parameters.get(unit, 0)

    def of_layer(self, index: int, sizes: Sizes) -> int:
        return removed_parameters(self.shape.layers[index], dict(sizes))

    def channels_for(self, index: int, amount: float) -> float:
        layer = self.shape.layers[index]
        size = layer.sizes[FIELDS["ffn"]]
        return size - amount / layer.unit_parameters["ffn"] if layer.has_ffn else float(size)


def parameters_of(plan: Plan, shape: ModelShape) -> ParameterBudget:
    """As many parameters as a plan removes."""
    return ParameterBudget(shape, plan.parameters_before - plan.parameters)


def adjust_to_target(
    shape: ModelShape,
    layers: list[dict[str, int]],
    round_to: int,
    budget: Budget,
    units: Callable[[LayerShape], list[str]] = free_units,
) -> None:
    """Meet the target in place, round robin over FFNs: narrow by one step each, then widen while it stays met.

    A step that removes nothing, as on a flat part of a curve of times, is taken together with those after it.

    Args:
        units: the units of a layer whose widths may change.
    """
    over = removed_by(budget, layers) - budget.target
    steps = [
        (index, unit, step_of_unit(layer, unit, round_to))
        for index, layer in enumerate(shape.layers)
        for unit in units(layer)
    ]
    for narrows in (True, False):
        moved = True
        while moved:
            moved = False
            for index, unit, step in steps:
                field, dense, before = FIELDS[unit], shape.layers[index], budget.of_layer(index, layers[index])
                width = layers[index][field]
                wider = range(width + step, min(width + step, dense.sizes[field]) + 1)
                for chosen in range(width - step, 0, -step) if narrows and over < 0 else () if narrows else wider:
                    sizes = tied_to(dense, {**layers[index], field: chosen})
                    more = budget.of_layer(index, sizes) - before
                    if more > 0 or (not narrows and over + more >= 0):
                        layers[index] = sizes
                        over += more
                        moved = True
                        break
