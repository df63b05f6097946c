"""LLM-Pruner (Ma et al., NeurIPS 2023, arXiv 2305.11627): first-order Taylor importance, element by element.

The importance of a weight is ``|w dL/dw|`` on a few samples with the language-modelling loss (the paper's
"Element^1", which its code takes by default), summed over all weights that go with a unit. Each layer loses its
least important units, the same share of every layer but the first ones and the last ones, which stay whole: the
published runs prune layers 4 to 29 of LLaMA-7B's 32. Nothing is repaired; the authors train afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from baselines.units import HEADS, Job, Kept, cut, decoder_layers, structures_of
from slimgpt.models.architecture import Fused, Structure
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import describe
from slimgpt.models.slicing import output_matrix
from slimgpt.planning.planner import make_plan

HEAD_UNIT = "kv"
SAMPLES, TOKENS = 10, 128
"""Ten samples cut to 128 tokens, as published."""
FIRST, LAST = 4 / 32, 30 / 32
"""The pruned layers' share of the depth."""


def llm_pruner(model: PreTrainedModel, job: Job) -> None:
    """Prune in place."""
    gradients = weight_gradients(model, job.windows[:SAMPLES, :TOKENS])
    structures, sizes = structures_of(model, HEAD_UNIT), layer_sizes(model.config)
    shape = describe(model.config, model)
    schedule = layer_shares(len(sizes), job.ratio)
    plan = make_plan(model.config, schedule=schedule, head_unit=HEAD_UNIT, shape=shape)
    kept: Kept = []
    for layer, gradient, before, after in zip(decoder_layers(model), gradients, sizes, plan.layers):
        salience = {name: (layer.get_parameter(name) * g).abs().detach() for name, g in gradient.items()}
        kept.append({})
        for name, structure in structures.items():
            importance = unit_importance(salience, structure, structure.units(before), before)
            best = importance.topk(structure.units(after)).indices
            kept[-1][name] = best.sort().values
            assert name == HEADS or len(best) == after["intermediate_size"]
    cut(model, kept, HEAD_UNIT, job)


def layer_shares(layers: int, ratio: float) -> list[float]:
    """The ratio of every layer, 0 for those that stay whole, with mean ``ratio``."""
    first, last = round(FIRST * layers), round(LAST * layers)
    inside = ratio * layers / (last - first)
    return [inside if first <= index < last else 0.0 for index in range(layers)]


def weight_gradients(model: PreTrainedModel, samples: Tensor) -> list[dict[str, Tensor]]:
    """The gradient of the mean loss for every matrix of every decoder layer, in fp32.

    Args:
        samples: ``(samples, tokens)`` long.
    """
    layers = decoder_layers(model)
    tied = {
        f"{module}.weight" for structure in structures_of(model, HEAD_UNIT).values() for module in structure.modules
    }
    model.requires_grad_(False)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in tied)
    with torch.enable_grad():
        model(input_ids=samples, labels=samples, use_cache=False).loss.backward()
    gradients = []
    for layer in layers:
        gradients.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
        for parameter in layer.parameters():
            parameter.grad = None
    model.requires_grad_(False)
    return gradients


def unit_importance(salience: dict[str, Tensor], structure: Structure, units: int, sizes: dict[str, int]) -> Tensor:
    """The salience of all weights that go with each unit, ``(units,)``.

    Args:
        salience: by parameter name of the layer, shaped as the parameter.
    """
    total = output_matrix(salience, structure).sum(0).view(units, -1).sum(1)
    for item in structure.inputs:
        fused = Fused(item, (structure.sizes[0],), (0,)) if isinstance(item, str) else item
        weight = salience[f"{fused.module}.weight"]
        rows = weight.sum(0 if structure.transposed else 1).view(fused.block_count(sizes), -1)
        shares = [sizes[part] for part in fused.parts]
        pieces = rows.split([rows.shape[1] * share // sum(shares) for share in shares], dim=1)
        for i in fused.sliced:
            total = total + pieces[i].reshape(units, -1).sum(1)
    return total
