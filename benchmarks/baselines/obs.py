"""Uniform Optimal Brain Surgeon, as ZipLM and OSSCAR remove structures from a layer.

ZipLM (Kurtic et al., NeurIPS 2023, arXiv 2302.04089) removes one structure at a time by its exact cost and updates
what stays; OSSCAR (Meng et al., ICML 2024, arXiv 2403.12983), as fmchisel ships it, removes the same number of KV
groups and FFN channels from every layer. This is both: exact costs one by one, repair, equal layers. Neither ZipLM's
latency search nor OSSCAR's local swaps are here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from baselines.package import pruned
from baselines.units import Job
from slimgpt import config
from slimgpt.solver import CRITERIA, Criterion, select_channels, select_heads

NAME = "obs-uniform"


def _heads(W: Tensor, H: Tensor, units: int, keep: int, groups: int, generator: torch.Generator) -> Tensor:
    del generator
    return select_heads(W, H, units, keep, groups, "exact")


def _channels(W: Tensor, H: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    del generator
    return select_channels(W, H, keep, [1] * (W.shape[1] - keep))


CRITERIA[NAME] = Criterion(_heads, _channels, True, "ZipLM, arXiv 2302.04089; OSSCAR, arXiv 2403.12983")
config.METHODS = (*config.METHODS, NAME)


def obs_uniform(model: PreTrainedModel, job: Job) -> None:
    """Prune in place, the same number of KV heads and of channels in every layer."""
    pruned(model, job, method=NAME, uniform=True, head_unit="kv")
