"""Tiny random models of every family: unequal numbers, biases, random norms, windows shorter than the text."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS, VOCABULARY = 4, 97

COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 52,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": True,
    "attn_implementation": "eager",
}
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)

OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5, "tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "layer_types": ALTERNATING, "head_dim": 8},
    "qwen3": {"attention_bias": True},
    "gemma2": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 10},
    "gemma3_text": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 10},
    "granite": {"attention_bias": True, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "head_dim": None},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "head_dim": None},
    "phi3": {"head_dim": None, "sliding_window": 7, "num_attention_heads": 6, "tie_word_embeddings": False},
}


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model in fp32, every parameter drawn, norms and biases too."""
    values = {key: value for key, value in {**COMMON, **OWN[model_type], **changes}.items() if value is not None}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 + 0.4 * noise if "norm" in name else noise * (0.6 / parameter.shape[-1] ** 0.5 + 0.05))
    return model


def windows(num_samples: int = 12, seq_len: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids ``(num_samples, seq_len)``."""
    return torch.randint(VOCABULARY, (num_samples, seq_len), generator=torch.Generator().manual_seed(seed))
