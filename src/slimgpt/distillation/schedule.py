"""Number of tokens that a pruned model is trained on, its cost, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.errors import UsageError
from slimgpt.models.architecture import Sizes, Structure
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.families.moe import EXPERTS, Experts
from slimgpt.models.lookup import layer_sizes, text_config
from slimgpt.planning.plan import Plan
from slimgpt.runtime.thresholds import thresholds

BACKWARD_COST = 4 / 3
"""Cost of a backward pass in forward passes: 1 for input gradients, 1/3 for weight gradients of the output matrices."""


GENERATION_COST = 1.5
"""Cost of a generated token in forward passes: one, and the LM head."""


WARMUP = 0.1
"""Share of the steps in which the learning rate rises to its maximum."""


class TrainingBudget(NamedTuple):
    """Limits of the training after pruning.

    Args:
        passes: so many forward passes of the dense layers over the calibration tokens the training may cost.
        steps: about so many, of at least ``step_tokens`` of :class:`~slimgpt.runtime.thresholds.Thresholds`.
        other_matrices_lr: learning rate of the non-output matrices relative to the output matrices; 0 freezes them.
        generates: whether the dense model writes what the text lacks.
    """

    passes: float
    steps: int
    other_matrices_lr: float
    generates: bool = True

    def cost_per_token(self, plan: Plan) -> float:
        """Cost of a token of the text, in forward passes of the dense layers: one, and the passes forward and backward
        through the pruned layers."""
        return 1 + (1 + (2 if self.other_matrices_lr else BACKWARD_COST)) * (1 - plan.achieved)


DEFAULT_BUDGET, SEARCH_BUDGET = TrainingBudget(1.4, 64, 0.0), TrainingBudget(11.5, 320, 0.25)
"""By default, and with ``--allocation search``."""

EQUAL_BUDGET = TrainingBudget(2.7, 128, 0.0, generates=False)
"""With ``--uniform``: equal layers lose more that the training can repair, so it is up to twice as long, on the whole
text at most."""


HELD_OUT_TOKENS = 2048
"""So many tokens are neither repaired nor trained on: the training is kept only if its losses fell there."""


MAX_SEQ_LEN = 256
"""Longer windows are cut into pieces of so many tokens; what is left of a window is not trained on."""


def passes_to_distill(config: PruneConfig, plan: Plan, windows: Tensor, tokens: int) -> float:
    """Cost of the training, heads left out, in forward passes of the dense layers over one token: one over every token
    of the text, the writing of those that it lacks, and the passes forward and backward through the pruned layers."""
    return tokens * training_budget(config).cost_per_token(plan) + max(tokens - trainable_tokens(windows), 0) * (
        GENERATION_COST - 1
    )


def tokens_to_distill(config: PruneConfig, plan: Plan, windows: Tensor) -> int:
    """Number of tokens that a pruned model is trained on; 0: not at all. If they are more than the text has, the dense
    model writes the others.

    Raises:
        UsageError: it was asked for and cannot be done.
    """
    if config.distill == 0:
        return 0
    if config.distill == "auto":
        if windows.numel() < thresholds().min_training_tokens or len(windows) == 1:
            return 0
        budget = training_budget(config)
        return max(_tokens_of(each, plan, windows) for each in {budget, DEFAULT_BUDGET})
    if len(windows) == 1:
        raise UsageError(
            "distill: the last of the calibration windows is only judged by, so one is too few; raise --num-samples, "
            "with a lower --seq-len if the text is short"
        )
    return int(config.distill)


def _tokens_of(budget: TrainingBudget, plan: Plan, windows: Tensor) -> int:
    """Number of tokens that cost what a budget has, those of the text first."""
    passes, cost_per_token = budget.passes * windows.numel(), budget.cost_per_token(plan)
    available = trainable_tokens(windows)
    beyond = (passes - available * cost_per_token) / (cost_per_token + GENERATION_COST - 1)
    return int(passes / cost_per_token if beyond <= 0 else available + (beyond if budget.generates else 0))


def disk_to_distill(
    model: PreTrainedModel,
    config: PruneConfig,
    plan: Plan,
    windows: Tensor,
    tokens: int,
    itemsize: int,
    device: torch.device,
) -> int:
    """Bytes of the files that the training of a run from folder to folder keeps beside the layers.

    That is the hidden states of what the dense model writes; on a CPU, where memory holds nothing that grows with the
    depth, also what is trained, in fp32 with Adam's moments in bfloat16, and the hidden states of all text in front of
    the layers and behind them.

    Args:
        model: the dense model; its tensors need no storage.
        tokens: see :func:`tokens_to_distill`.
        itemsize: bytes of a number as it is stored.
    """
    hidden = text_config(model.config).hidden_size * itemsize
    written = hidden * max(tokens - trainable_tokens(windows), 0)
    if device.type != "cpu" or not tokens:
        return written
    structures = architecture_of(model.config, model).chosen(plan.head_unit)
    trained = 0.0
    for layer, dense, slim in zip(decoder_layers(model), layer_sizes(model.config), plan.layers):
        states = layer.state_dict()
        outputs = [(states[s.key].numel(), _share_left(s, dense, slim)) for s in structures if s.key in states]
        numbers = sum(tensor.numel() for tensor in states.values())
        trained += (
            numbers * (1 - plan.achieved)
            if training_budget(config).other_matrices_lr
            else sum(n * left for n, left in outputs)
        )
    return int(8 * trained) + 2 * written + 2 * hidden * tokens


def _share_left(structure: Structure, dense: Sizes, slim: Sizes) -> float:
    """The share of an output matrix, or of the stacked ones of experts, that stays."""
    experts = slim[EXPERTS] / dense[EXPERTS] if isinstance(structure, Experts) else 1.0
    return experts * structure.units(slim) / structure.units(dense)


def pruning_split(windows: Tensor, tokens: int) -> Tensor:
    """The windows that pruning calibrates on: if the pruned model is to be trained, the last ones are left out of it.

    Windows used for the repair would bias the comparison towards the untrained model, so the last ones are held out.

    Args:
        tokens: see :func:`tokens_to_distill`.
    """
    return windows[: -_held_windows(windows)] if tokens else windows


def training_budget(config: PruneConfig) -> TrainingBudget:
    """The budget of a run with these settings."""
    if config.allocation == "search":
        return SEARCH_BUDGET
    return EQUAL_BUDGET if config.uniform else DEFAULT_BUDGET


def trainable_tokens(windows: Tensor) -> int:
    """Number of calibration tokens that can be trained on, in pieces of at most :data:`MAX_SEQ_LEN`."""
    length = min(windows.shape[1], MAX_SEQ_LEN)
    return (len(windows) - _held_windows(windows)) * (windows.shape[1] // length * length)


def _held_windows(windows: Tensor) -> int:
    return max(min(HELD_OUT_TOKENS, windows.numel() // 4) // windows.shape[1], 1)


def learning_rate(step: int, steps: int) -> float:
    """The rate of a step, as a share of the highest: it rises, then falls to nothing on a cosine."""
    rise = max(int(WARMUP * steps), 1)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))
