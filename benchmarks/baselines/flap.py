"""FLAP: Fluctuation-based Adaptive Structured Pruning (An et al., AAAI 2024, arXiv 2312.11983).

A column that hardly fluctuates can be replaced by its mean, and the mean goes into a bias. Columns are scored by
WIFV, the variance of the input times the squared norm of the weight's column, on the dense model's activations. The
scores are standardised within every layer's matrix, so that one ranking over the whole model decides how much each
layer and each kind of structure loses ("AL-AM"). A bias on ``o_proj`` and ``down_proj`` restores the mean output;
it counts as parameters here.

The authors' code has multi-head models only. With grouped queries a unit is a KV head with its query heads, as in
forks of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baselines.units import CHANNELS, HEADS, Job, Kept, cut, decoder_layers, structures_of, walk
from slimgpt.models.architecture import Structure
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import describe
from slimgpt.models.slicing import output_matrix, unit_rows

HEAD_UNIT = "kv"


class Moments:
    """Running mean and variance of every column, in fp64 and in host memory."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Add every row of ``x``, shape ``(..., n)``."""
        x = x.reshape(-1, x.shape[-1]).double()
        self.count += len(x)
        self.total = self.total + x.sum(0).cpu()
        self.squares = self.squares + x.square().sum(0).cpu()

    @property
    def mean(self) -> Tensor:
        """``(n,)``."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """``(n,)``, the sample variance."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0) * (self.count / (self.count - 1))


def flap(model: PreTrainedModel, job: Job) -> None:
    """Prune in place: the global ranking, and the bias unless our repair takes its place."""
    moments = input_moments(model, job)
    structures, sizes = structures_of(model, HEAD_UNIT), layer_sizes(model.config)
    weights = [
        {name: output_matrix(layer.state_dict(), s).double() for name, s in structures.items()}
        for layer in decoder_layers(model)
    ]
    scores = [
        {name: unit_scores(W[name], seen[name].variance, s.units(widths)) for name, s in structures.items()}
        for W, seen, widths in zip(weights, moments, sizes)
    ]
    shape = describe(model.config, model)
    costs = [
        {HEADS: layer.unit_parameters[HEAD_UNIT], CHANNELS: layer.unit_parameters["ffn"]} for layer in shape.layers
    ]
    gains = [{} if job.repair else new_biases(layer, structures) for layer in decoder_layers(model)]
    kept = rank_globally(scores, costs, job.ratio * shape.layer_parameters, gains)
    biases = [] if job.repair else mean_outputs(weights, moments, kept, scores)
    cut(model, kept, HEAD_UNIT, job)
    for layer, outputs in zip(decoder_layers(model), biases):
        for name, bias in outputs.items():
            linear = layer.get_submodule(structures[name].output)
            assert isinstance(linear, nn.Linear)
            before = 0.0 if linear.bias is None else linear.bias.detach()
            linear.bias = nn.Parameter((bias + before).to(linear.weight))


def input_moments(model: PreTrainedModel, job: Job) -> list[dict[str, Moments]]:
    """For every layer the moments of the inputs of its output matrices, on the dense model."""
    moments_by_layer: list[dict[str, Moments]] = [
        {HEADS: Moments(), CHANNELS: Moments()} for _ in decoder_layers(model)
    ]

    def watch(index: int, layer: nn.Module) -> None:
        for name, structure in structures_of(model, HEAD_UNIT).items():
            moments = moments_by_layer[index][name]
            linear = layer.get_submodule(structure.output)
            linear.register_forward_pre_hook(lambda _, inputs, moments=moments: moments.add(inputs[0]))

    walk(model, job, watch)
    return moments_by_layer


def unit_scores(W: Tensor, variance: Tensor, units: int) -> Tensor:
    """WIFV of every column, standardised over the matrix, then the mean over each unit's columns: ``(units,)``.

    Args:
        W: ``(out, n)``, the output matrix.
        variance: ``(n,)``, of its inputs.
    """
    scores = variance * W.square().sum(0)
    scores = (scores - scores.mean()) / scores.std()
    return scores.view(units, -1).mean(1)


def new_biases(layer: nn.Module, structures: dict[str, Structure]) -> dict[str, int]:
    """Parameters of the biases that a layer's output matrices do not have yet."""
    matrices = {name: layer.get_submodule(structure.output) for name, structure in structures.items()}
    return {name: len(matrix.weight) for name, matrix in matrices.items() if matrix.bias is None}


def rank_globally(
    scores: list[dict[str, Tensor]], costs: list[dict[str, int]], target: float, gains: list[dict[str, int]]
) -> Kept:
    """Remove the units with the lowest scores of the whole model until ``target`` parameters are gone.

    One unit of every structure stays. A unit that would overshoot by more than the smallest unit's cost is passed over.

    Args:
        scores: for every layer the scores of its ``heads`` and ``channels``.
        costs: for every layer the parameters of one of each.
        gains: for every layer the parameters that a structure gains as soon as it has lost something.
    """
    ranking = sorted(
        (value, index, name, unit)
        for index, layer in enumerate(scores)
        for name, values in layer.items()
        for unit, value in enumerate(values.tolist())
    )
    live = [{name: torch.ones(len(values), dtype=torch.bool) for name, values in layer.items()} for layer in scores]
    smallest = min(min(layer.values()) for layer in costs)
    removed = 0
    for _, index, name, unit in ranking:
        mask = live[index][name]
        loss = costs[index][name] - (gains[index].get(name, 0) if bool(mask.all()) else 0)
        if removed >= target - smallest / 2:
            break
        if int(mask.sum()) > 1 and removed + loss < target + smallest:
            mask[unit] = False
            removed += loss
    return [{name: mask.nonzero().squeeze(1) for name, mask in layer.items()} for layer in live]


def mean_outputs(
    weights: list[dict[str, Tensor]], moments: list[dict[str, Moments]], kept: Kept, scores: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """The mean of what the removed columns gave to the output, ``(out,)``, where something was removed."""
    biases: list[dict[str, Tensor]] = []
    for W, seen, units, values in zip(weights, moments, kept, scores):
        biases.append({})
        for name, matrix in W.items():
            if len(units[name]) < len(values[name]):
                gone = torch.ones(matrix.shape[1], dtype=torch.bool)
                gone[unit_rows(matrix.shape[1], len(values[name]), units[name])] = False
                biases[-1][name] = matrix[:, gone] @ seen[name].mean[gone]
    return biases
