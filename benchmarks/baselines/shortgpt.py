"""ShortGPT (Men et al., arXiv 2403.03853): whole layers go, those that change the hidden states least.

Block Influence of a layer is one minus the mean cosine between its input and its output over all tokens of the
calibration text, on the dense model. Only whole numbers of layers can go: the share achieved is the nearest one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from baselines.units import Job, decoder_layers, walk
from slimgpt.models.build import architecture_of
from slimgpt.models.parameter_counts import count


def shortgpt(model: PreTrainedModel, job: Job) -> None:
    """Remove layers in place; the nearest number of them to the ratio's parameters."""
    layers = decoder_layers(model)
    influence = block_influence(model, job)
    sizes = [count(layer) for layer in layers]
    kept = layers_to_keep(influence, sizes, job.ratio)
    for index, layer in enumerate(layers[i] for i in kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    owner, _, leaf = architecture_of(model.config, model).layers.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.ModuleList(layers[i] for i in kept))
    model.config.num_hidden_layers = len(kept)
    for field in ("layer_types", "no_rope_layers"):
        if (values := getattr(model.config, field, None)) is not None:
            setattr(model.config, field, [values[i] for i in kept])


def layers_to_keep(influence: Tensor, sizes: list[int], ratio: float) -> list[int]:
    """The layers that stay, in order: those of least influence go while that brings the size nearer to the ratio."""
    target, removed, gone = ratio * sum(sizes), 0, set()
    for index in influence.argsort().tolist():
        if abs(removed + sizes[index] - target) >= abs(removed - target):
            break
        gone.add(index)
        removed += sizes[index]
    return [index for index in range(len(sizes)) if index not in gone]


def block_influence(model: PreTrainedModel, job: Job) -> Tensor:
    """``1 - E[cos(x_in, x_out)]`` of every layer, ``(layers,)``."""
    total = torch.zeros(len(decoder_layers(model)), dtype=torch.float64)

    def add(index: int, before: Tensor, after: Tensor) -> None:
        total[index] += F.cosine_similarity(before.double(), after.double(), dim=-1).sum().cpu()

    walk(model, job, moved=add)
    return 1 - total / job.windows.numel()
