"""Families that engines without a general way in have classes for."""

from __future__ import annotations

MLX_VERSION = "0.32.2"

_MLX = """
    llama mistral qwen2 qwen3 gemma2 gemma3_text granite smollm3 phi3 ministral3 gemma olmo olmo2 olmo3 exaone4
    seed_oss ernie4_5 hunyuan_v1_dense helium cohere cohere2 glm glm4 apertus nemotron nanochat starcoder2 phi stablelm
    gpt_neox gptj gpt2 gpt_bigcode falcon_h1 olmo_hybrid lfm2 recurrent_gemma internlm3 iquestcoder minicpm3 mixtral
    minimax minimax_m2 qwen2_moe qwen3_moe qwen3_next mellum llama4_text gemma4_text olmoe granitemoe granitemoehybrid
    phimoe gpt_oss deepseek_v2 deepseek_v3 deepseek_v32 glm_moe_dsa glm4_moe_lite mistral4 glm4_moe dots1 solar_open
    exaone_moe afmoe ernie4_5_moe lfm2_moe mimo_v2_flash laguna nemotron_h jamba kimi_linear bailing_hybrid gemma3 llava
    mistral3 qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe kimi_k25 muse_glimmer muse_spark
    minimax_m3_vl gemma4 gemma4_unified llama4
"""

MLX_CLASSES = frozenset(_MLX.split())
"""Types of ours that mlx-lm has a module for, by its ``mlx_lm/models`` and the names that ``mlx_lm/utils.py`` maps."""
