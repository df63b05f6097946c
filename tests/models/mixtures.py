"""Tiny random mixtures of experts: unequal numbers, biases, groups of experts, dense layers among them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from tests.models.families import ALTERNATING, HYBRID, LATENT_HEADS, LAYERS, LINEAR, MAMBA, OWN, tiny_model

LATENT: dict[str, Any] = {
    **LATENT_HEADS,
    "moe_intermediate_size": 40,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}

INDEXER: dict[str, Any] = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 2}
WINDOW: dict[str, Any] = {"sliding_window": 5}
SOME_DENSE: dict[str, Any] = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
SHARED_EXPERT: dict[str, Any] = {
    "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 30,
}  # fmt: skip
ROUTED: dict[str, Any] = {
    "n_routed_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
COUNTED: dict[str, Any] = {
    "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_shared_experts": 1,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "layer_types": ALTERNATING, **WINDOW, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "global_head_dim": 14, "num_global_key_value_heads": 2, "attention_k_eq_v": True,
}  # fmt: skip
GRANITE: dict[str, Any] = {
    "num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 40, "head_dim": None,
    "attention_multiplier": 0.3, "residual_multiplier": 0.7,
}  # fmt: skip
LINEAR_HEADS: dict[str, Any] = {"linear_num_heads": 4, "linear_head_dim": 8, "layer_group_size": 2}
NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["full_attention", "mlp", "moe", "moe"], "num_hidden_layers": None,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 30, "mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 8, "use_mamba_kernels": False,
}  # fmt: skip

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
    "deepseek_v32": {**LATENT, **INDEXER, "q_lora_rank": 12, "n_group": 2, "topk_group": 1},
    "glm_moe_dsa": {**LATENT, **INDEXER, "q_lora_rank": 12, "n_group": 1, "topk_group": 1},
    "glm4_moe_lite": {**LATENT, "q_lora_rank": 12, "n_group": 2, "topk_group": 1},
    "mistral4": {**LATENT, "q_lora_rank": 12, "n_group": 2, "topk_group": 1},
    "axk1": {**LATENT, "q_lora_rank": 12, "n_group": 2, "topk_group": 1},
    "minimax": {"num_local_experts": 5, "intermediate_size": 40, "head_dim": 8, "block_size": 8},
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40},
    "qwen3_next": {**SHARED_EXPERT, **LINEAR, "layer_types": HYBRID, "num_experts": 6, "mlp_only_layers": [1]},
    "qwen3_5_moe_text": {**SHARED_EXPERT, **LINEAR, "layer_types": HYBRID, "num_experts": 6},
    "flint": {**SHARED_EXPERT, "num_experts": 6, "mlp_only_layers": [0], "layer_types": ALTERNATING, **WINDOW},
    "mellum": {"num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, **SOME_DENSE},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "head_dim": 8},
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 30},
    "granitemoe_swa": {**GRANITE, "layer_types": ALTERNATING, **WINDOW},
    "granitemoehybrid/experts": {
        **GRANITE, **MAMBA, "layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 30, "head_dim": 8,
    },
    "glm4_moe": {**ROUTED, "n_group": 2, "topk_group": 1},
    "dots1": {**ROUTED, "n_group": 2, "topk_group": 1},
    "solar_open": {**ROUTED, "n_group": 2, "topk_group": 1},
    "exaone_moe": {**COUNTED, "n_group": 2, "topk_group": 1, "layer_types": ALTERNATING, **WINDOW, **SOME_DENSE},
    "hy_v3": {**COUNTED, **SOME_DENSE},
    "afmoe": {**COUNTED, "num_dense_layers": 1, "layer_types": ALTERNATING, **WINDOW},
    "beam": {**COUNTED, "n_group": 2, "topk_group": 1, "layer_types": ALTERNATING, **WINDOW, **SOME_DENSE},
    "kolibri1": {**SHARED_EXPERT, "num_local_experts": 6, "layer_types": ALTERNATING, **WINDOW},
    "cohere2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 52, "layer_types": ALTERNATING, **WINDOW, **SOME_DENSE,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 40, "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1, "moe_layer_end_index": 3, "use_bias": False, "head_dim": 8,
    },
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 2, "intermediate_size": 40},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2, "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 40, "num_dense_layers": 1, "head_dim": 8,
    },
    "mimo_v2_flash": {
        **ROUTED, "n_group": 2, "topk_group": 1, "layer_types": ALTERNATING, **WINDOW,
        "mlp_layer_types": ["sparse"] * LAYERS,
    },
    "laguna": {**SHARED_EXPERT, "num_experts": 6, "layer_types": ALTERNATING, **WINDOW, **SOME_DENSE},
    "aria_text": {"moe_num_experts": 6, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 40},
    "llama4_text": {
        "num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size": 40, "intermediate_size_mlp": 52,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 8,
    },
    "gemma4_text/experts": {
        **GEMMA4, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40,
    },
    "jamba/experts": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 6, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 0, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False, "head_dim": 8, "pad_token_id": 0,
    },
    "nemotron_h": {**NEMOTRON, "moe_latent_size": 20},
    "kimi_linear": {
        **LATENT, **LINEAR_HEADS, **COUNTED, "num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1,
        "layer_types": HYBRID, **SOME_DENSE, "q_lora_rank": None,
    },
    "bailing_hybrid": {
        **LATENT, **LINEAR_HEADS, **COUNTED, "num_experts_per_token": 2, "num_expert_group": 2, "topk_group": 1,
        "layer_types": HYBRID, **SOME_DENSE, "q_lora_rank": None,
    },
}  # fmt: skip
OWN.update(OWN_OF_MIXTURES)


def tiny_mixture(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model whose routers and correction biases are drawn too; see :func:`tiny_model`."""
    model = tiny_model(model_type, **changes)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.copy_(torch.arange(buffer.numel()).sin() * 0.1)
    return model
