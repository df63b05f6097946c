"""Tiny random mixtures of experts: unequal numbers, biases, groups of experts, dense layers among them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tests.models.families import ALTERNATING, OWN, tiny_model

LATENT: dict[str, Any] = {
    "intermediate_size": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 9,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}

OWN_OF_MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "intermediate_size": 40, "sliding_window": 5},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 30,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "head_dim": None,
    },
    "qwen3_moe": {
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "decoder_sparse_step": 2,
        "attention_bias": True,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "head_dim": None, "clip_qkv": 4.0},
    "granitemoe": {
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "intermediate_size": 40,
        "head_dim": None,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "phimoe": {
        "num_local_experts": 5,
        "intermediate_size": 40,
        "head_dim": None,
        "sliding_window": 7,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 40,
        "sliding_window": 5,
        "layer_types": ALTERNATING,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {**LATENT, "q_lora_rank": 12, "n_group": 2, "topk_group": 1},
}
OWN.update(OWN_OF_MIXTURES)


def tiny_mixture(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model whose routers and correction biases are drawn too; see :func:`tiny_model`."""
    model = tiny_model(model_type, **changes)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(buffer.new_tensor(range(len(buffer))).sin() * 0.1)
    return model
