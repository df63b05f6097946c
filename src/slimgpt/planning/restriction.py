"""A model's shape without the units that the settings keep: ``ffn_only``, ``heads_only``, ``skip_layers``, and whole
attentions."""

from __future__ import annotations

from dataclasses import replace

from slimgpt.config import PruneConfig
from slimgpt.errors import PlanError
from slimgpt.models.parameter_counts import LayerShape, ModelShape
from slimgpt.planning.plan import UNITS_OF_HEADS
from slimgpt.runtime.units import parse_layers


def restricted(shape: ModelShape, config: PruneConfig) -> ModelShape:
    """The shape in which only those units can be removed that the settings let go.

    What is kept looks like a layer of a hybrid that lacks it, so that planning and allocation need not know.

    Raises:
        PlanError: a layer that is not there, or nothing is left that can be removed.
    """
    if config.drop_attention and not any(layer.attention_parameters for layer in shape.layers):
        raise PlanError(
            "drop_attention: no layer of this model can do without its attention (the family is not described so, or "
            "one of every kind is left); leave it out"
        )
    if not config.drop_attention and config.plan is None:
        shape = replace(shape, layers=tuple(replace(layer, attention_parameters=0) for layer in shape.layers))
    skipped = skipped_layers(parse_layers(config.skip_layers) or (), len(shape.layers))
    if not (skipped or config.ffn_only or config.heads_only):
        return shape
    layers = tuple(
        _kept(layer) if index in skipped else _some_kept(layer, config) for index, layer in enumerate(shape.layers)
    )
    if not any(layer.unit_parameters for layer in layers):
        raise PlanError(
            "skip_layers, ffn_only and heads_only together leave nothing that can be removed; leave one out"
        )
    return replace(shape, layers=layers)


def skipped_layers(indices: tuple[int, ...], count: int) -> set[int]:
    """Indices from 0 for those given, of which negative ones count from the end.

    Raises:
        PlanError: a layer that is not there.
    """
    for index in indices:
        if not -count <= index < count:
            raise PlanError(f"skip_layers names layer {index}, but the model has {count}: 0 to {count - 1}")
    return {index % count for index in indices}


def _some_kept(layer: LayerShape, config: PruneConfig) -> LayerShape:
    if config.heads_only:
        units = {unit: numel for unit, numel in layer.unit_parameters.items() if unit in UNITS_OF_HEADS}
        return replace(layer, unit_parameters=units, experts=None)
    if config.ffn_only:
        units = {unit: numel for unit, numel in layer.unit_parameters.items() if unit not in UNITS_OF_HEADS}
        return replace(layer, unit_parameters=units, attention_parameters=0)
    return layer


def _kept(layer: LayerShape) -> LayerShape:
    return replace(layer, unit_parameters={}, experts=None, attention_parameters=0)
