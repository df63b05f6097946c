"""The tensors of a mixture of experts: one expert run by itself, and narrower mixtures. Pure.

transformers stacks the matrices of all experts of a layer: ``gate_up_proj`` ``(experts, 2 * width, hidden)`` and
``down_proj`` ``(experts, hidden, width)``, or their transposes, sometimes with biases. So every expert of a layer keeps
the same number of channels, though each its own; layers may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimgpt.models.families.moe import Experts
from slimgpt.models.slicing import State


def routed(arguments: tuple[Any, ...], experts: Experts, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens ``(tokens, hidden)``, the experts of each and their weights, ``(tokens, k)``, of one call.

    Args:
        arguments: what the module of the experts was called with.
        count: how many experts it holds.
    """
    if not experts.scaled_inputs:
        tokens, index, weights = arguments
        return tokens, index, weights
    by_expert = arguments[0].view(count, -1, arguments[0].shape[-1])
    index = by_expert.abs().amax(-1).argmax(0).unsqueeze(1)
    return by_expert.sum(0), index, by_expert.new_ones(index.shape)


def returned(outputs: Tensor, experts: Experts, count: int) -> Tensor:
    """The output of the experts' module, from the sum of their outputs ``(tokens, hidden)``."""
    if not experts.scaled_inputs:
        return outputs
    return torch.cat([outputs, outputs.new_zeros((count - 1) * len(outputs), outputs.shape[1])])  # summed by the layer


def intermediate(module: Any, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
    """The inputs of an expert's output matrix, ``(count, width)``, by the module's own gate or activation.

    Args:
        module: the module that holds all experts of a layer.
        tokens: ``(count, hidden)``.
    """
    gated = hasattr(module, "gate_up_proj")
    name = "gate_up_proj" if gated else "up_proj"
    weight, biases = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
    rows = F.linear(tokens, weight.T if experts.transposed else weight, None if biases is None else biases[expert])
    if not gated:
        return module.act_fn(rows)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(rows)
    gate, up = rows.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def down_matrix(tensors: Mapping[str, Tensor], experts: Experts, expert: int) -> tuple[Tensor, Tensor | None]:
    """An expert's output matrix ``(hidden, width)`` and its bias.

    Args:
        tensors: the layer's state dict.
    """
    W = tensors[f"{experts.module}.down_proj"][expert]
    bias = tensors.get(f"{experts.module}.down_proj_bias")
    return (W.T if experts.transposed else W), (None if bias is None else bias[expert])


def expert_output(module: nn.Module, experts: Experts, expert: int, tokens: Tensor) -> Tensor:
    """The output of an expert for its tokens, ``(count, hidden)``, before the router's weight."""
    tensors = {f"{experts.module}.{name}": value for name, value in module.named_parameters()}
    W, bias = down_matrix(tensors, experts, expert)
    return F.linear(intermediate(module, experts, expert, tokens), W, bias)


def keep_experts(state: State, experts: Experts, kept: Tensor) -> State:
    """The state dict of the layer with only the kept experts and their rows of the router.

    Args:
        kept: ``(keep,)`` long, sorted.
    """
    stacked, count = (f"{experts.module}.", f"{experts.router}."), len(state[experts.key])
    kept_state = dict(state)
    for name, tensor in state.items():
        if name.startswith(stacked) or name in experts.per_expert:
            axis = tensor.shape.index(count)  # some hold a correction as a row: (1, experts)
            kept_state[name] = tensor.index_select(axis, kept.to(tensor.device))
    return kept_state


def scale_experts(state: State, experts: Experts, scales: Tensor) -> State:
    """The state dict of the layer with every expert's output multiplied by its own number.

    Args:
        scales: ``(experts,)``.
    """
    scaled = dict(state)
    for name in (f"{experts.module}.down_proj", f"{experts.module}.down_proj_bias"):
        if name in state:
            tensor = state[name]
            factor = scales.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            scaled[name] = (tensor.to(factor.dtype) * factor).to(tensor.dtype)
    return scaled


def keep_channels(state: State, experts: Experts, kept: Tensor, down: Tensor) -> State:
    """The state dict of the layer with only the kept channels of every expert.

    Args:
        kept: ``(experts, keep)`` long, for every expert its kept channels, sorted.
        down: ``(experts, hidden, keep)``, the repaired output matrices.
    """
    sliced = {**state, f"{experts.module}.down_proj": (down.mT if experts.transposed else down).contiguous()}
    for leaf in ("gate_up_proj", "up_proj", "gate_up_proj_bias", "up_proj_bias"):
        name = f"{experts.module}.{leaf}"
        if name not in state:
            continue
        tensor = state[name]
        axis = 1 if leaf.endswith("bias") or not experts.transposed else 2
        parts = 2 if leaf.startswith("gate") else 1
        width = tensor.shape[axis] // parts
        chosen = kept.to(tensor.device)
        if experts.interleaved:
            rows = (chosen.unsqueeze(2) * parts + torch.arange(parts, device=chosen.device)).flatten(1)
        else:
            rows = torch.cat([chosen + part * width for part in range(parts)], dim=1)  # (experts, parts * keep)
        sliced[name] = torch.stack([t.index_select(axis - 1, r) for t, r in zip(tensor, rows)])
    return sliced
