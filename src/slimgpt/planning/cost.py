"""Costs of a plan: bytes in every dtype, FLOPs per token, and the work of pruning itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes
from slimgpt.models.families.moe import EXPERTS, SHARED, Mixture
from slimgpt.models.lookup import head_dim, lookup, text_config
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.models.ties import is_tied
from slimgpt.planning.plan import Plan
from slimgpt.planning.targets import CACHE_BYTES, cache_bytes
from slimgpt.runtime.devices import matmul_seconds

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_BITS = {"F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_1": 6.0, "Q4_K": 4.5, "Q5_0": 5.5}
_FALLBACK = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_0"}
"""What llama.cpp takes where a row is no multiple of 256 numbers."""

_MIXES = {
    "F16": ("F16", "F16", "F16"),
    "Q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    "Q6_K": ("Q6_K", "Q6_K", "Q6_K"),
    "Q5_K_M": ("Q5_K", "Q6_K", "Q6_K"),
    "Q4_K_M": ("Q4_K", "Q6_K", "Q6_K"),
}
"""Type of most matrices, of half of the value and down matrices, and of the output matrix."""


def gguf_bytes(config: PreTrainedConfig, plan: Plan) -> dict[str, int]:
    """Bytes of the tensors of a GGUF file by type of quantisation: an estimate, for llama.cpp mixes types by rules."""
    tied, config = is_tied(config), text_config(config)
    h, d, vocab = config.hidden_size, head_dim(config), config.vocab_size
    norms = plan.parameters - _matrices(config, plan, tied)
    sizes = {}
    for name, (most, more, output) in _MIXES.items():
        bits = 32.0 * max(norms, 0)
        bits += vocab * h * _bits(output if tied else most, h)
        bits += 0 if tied else vocab * h * _bits(output, h)
        for layer in plan.layers:
            heads, kv, ffn = _widths(layer)
            half = (_bits(most, h) + _bits(more, h)) / 2
            bits += h * d * (heads + kv) * _bits(most, h) + h * kv * d * half
            bits += h * heads * d * _bits(most, heads * d)
            times = layer.get(EXPERTS, 1)
            bits += times * (2 * h * ffn * _bits(most, h) + h * ffn * (_bits(most, ffn) + _bits(more, ffn)) / 2)
        sizes[name] = int(bits / 8)
    return sizes


def flops_per_token(config: PreTrainedConfig, plan: Plan, dense: ModelShape | None = None) -> float:
    """Multiplications and additions for one generated token, the attention over the context left out.

    Args:
        dense: count the dense model instead.
    """
    layers = [layer.sizes for layer in dense.layers] if dense is not None else plan.layers
    return 2.0 * _read_parameters(config, layers, dense.parameters if dense is not None else plan.parameters)


def pruning_flops(
    config: PreTrainedConfig, dense: Sequence[Sizes], slim: Sequence[Sizes], tokens: int, seq_len: int
) -> dict[str, float]:
    """Multiplications and additions of pruning by part, and of one dense pass through the layers beside them.

    The Gram matrices are counted in full, though only blocks on and above the diagonal are multiplied.
    """
    entry, d, config = lookup(config), head_dim(config), text_config(config)
    h = config.hidden_size
    flops = {"dense forward": 0.0, "forward": 0.0, "hessian": 0.0, "solver": 0.0}
    for before, after in zip(dense, slim):
        heads, kv, ffn = _widths(before)
        kept, _, width = _widths(after)
        attention = 2.0 * seq_len * heads * d  # causal: half of QK^T and of the product with V
        count = after.get(EXPERTS, 1)
        active = entry.active_experts(config) if EXPERTS in before and isinstance(entry, Mixture) else 1
        # At dense widths: the choice is not made yet. A shared expert counts with the projections.
        inputs = h * d * (heads + 2 * kv) + 2 * h * ffn * active + 3 * h * before.get(SHARED, 0)
        flops["dense forward"] += tokens * (2.0 * (inputs + heads * d * h + active * ffn * h) + attention)
        passes = 2 if after.get(EXPERTS) != before.get(EXPERTS) else 0  # what whole experts cost to choose and to fit
        flops["forward"] += tokens * (2.0 * (inputs + kept * d * h + active * width * h) + attention)
        flops["forward"] += passes * tokens * 6.0 * h * ffn * active
        for n, keep, each, times in ((heads * d, kept * d, 1, 1), (ffn, width, active, count)):
            if keep < n:
                flops["hessian"] += 2.0 * tokens * each * n * n
                flops["solver"] += times * (n**3 + keep**3 / 3 + 2.0 * h * n * n + 2.0 * h * keep * keep)
    return flops


def machine_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions per second of a matrix product on this machine, from a short timing."""
    n = 2048 if device.type == "cuda" else 1024
    return 2.0 * n**3 / matmul_seconds(n, n, device, dtype)


def pruning_seconds(flops: dict[str, float], device: torch.device, dtype: torch.dtype) -> float:
    """About how long pruning takes here: the operations at the rate of a plain product, times what was measured.

    Loading and saving are left out.

    Args:
        flops: by part: ``forward``, ``hessian``, ``solver``, and ``gradients`` for all passes that take some.
    """
    forward = machine_rate(device, dtype)
    full = forward if device.type != "cpu" else machine_rate(device, torch.float32)
    passes = 1.25 * flops["forward"] + 2 * flops["gradients"]
    return passes / forward + (0.65 * flops["hessian"] + 4 * flops["solver"]) / full


def _widths(layer: Sizes) -> tuple[int, int, int]:
    return layer[HEADS], layer[KV_HEADS], layer[CHANNELS]


def _bits(kind: str, row: int) -> float:
    if kind == "F16" or row % 32:
        return _BITS["F16"]
    return _BITS[_FALLBACK.get(kind, kind) if row % 256 else kind]


def _matrices(config: PreTrainedConfig, plan: Plan, tied: bool) -> int:
    """Parameters in matrices, without norms and biases."""
    h, d = config.hidden_size, head_dim(config)
    total = config.vocab_size * h * (1 if tied else 2)
    for layer in plan.layers:
        heads, kv, ffn = _widths(layer)
        total += 2 * h * d * (heads + kv) + 3 * h * ffn * layer.get(EXPERTS, 1)
    return total


def generation_flops(
    config: PreTrainedConfig, layers: Sequence[Sizes], parameters: int, prompt: int, new_tokens: int
) -> tuple[float, float]:
    """Multiplications and additions per prompt token and per new token, attention over the context included.

    The prompt's logits are computed for its last token alone, so its tokens do without the output matrix.

    Args:
        layers: the widths of every layer.
        parameters: of the whole model, tied weights once.
    """
    read, config = _read_parameters(config, layers, parameters), text_config(config)
    body = read - config.vocab_size * config.hidden_size
    per_context = 4.0 * head_dim(config) * sum(_widths(layer)[0] for layer in layers)
    return 2.0 * body + per_context * prompt / 2, 2.0 * read + per_context * (prompt + new_tokens / 2)


def decode_bytes(
    config: PreTrainedConfig, layers: Sequence[Sizes], parameters: int, itemsize: int, context: int, batch: int = 1
) -> float:
    """Bytes that one step of decoding reads: the weights once, and the KV cache of every row of the batch.

    Of a mixture's experts those are counted that the rows are expected to go to, each to any with equal probability.

    Args:
        layers: the widths of every layer.
        parameters: of the whole model, tied weights once.
        itemsize: bytes of a number, in weights and cache.
        context: tokens in the cache of a row.
        batch: rows at once, of one new token each.
    """
    cache = cache_bytes(text_config(config), [layer[KV_HEADS] for layer in layers], context) / CACHE_BYTES
    return itemsize * (_read_parameters(config, layers, parameters, batch) + batch * cache)


def _read_parameters(config: PreTrainedConfig, layers: Sequence[Sizes], parameters: int, rows: int = 1) -> float:
    """Parameters that new tokens, one of each row, are multiplied with: without the token embeddings, of which one row
    is read (tied, they are the output matrix), and without the experts that no token goes to. Other tables and the
    parts of a multimodal model beside the language model are counted."""
    entry, tied, config = lookup(config), is_tied(config), text_config(config)
    read = float(parameters if tied else parameters - config.vocab_size * config.hidden_size)
    if isinstance(entry, Mixture):
        active = entry.active_experts(config)
        for sizes in layers:
            if EXPERTS in sizes:
                idle = sizes[EXPERTS] * max(1 - active / sizes[EXPERTS], 0.0) ** rows
                read -= idle * entry.expert_parameters(config, sizes[CHANNELS])
    return read
