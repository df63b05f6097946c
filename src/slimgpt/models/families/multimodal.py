"""Multimodal models: the language models inside them, and where these are."""

from __future__ import annotations

from dataclasses import replace

from slimgpt.models.architecture import Architecture, Entry
from slimgpt.models.families.dense import _GATED, _SEPARATE, DENSE, ffn, grouped, in_module
from slimgpt.models.families.mixtures import PARTS_WITH_EXPERTS

_QKV = in_module("self_attn", "q_proj", "k_proj", "v_proj")
_RESIZED = replace(_SEPARATE, resized=True)

PARTS: dict[str, Entry] = {
    **PARTS_WITH_EXPERTS,
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), _RESIZED),
    **dict.fromkeys(("qwen3_vl_text", "granite_docling_text", "hunyuan_vl_text"), _SEPARATE),
    **dict.fromkeys(("molmo2_text", "paddleocr_vl_text", "granite4_vision_text", "cohere_compass_text"), _SEPARATE),
    **dict.fromkeys(("glm4v_text", "glm_ocr_text"), DENSE["glm4"]),
    "cosmos3_edge_text": Architecture((*grouped("self_attn.o_proj", *_QKV), ffn("mlp.fc2", "mlp.fc1"))),
    "muse_glimmer_text": Architecture((*grouped("self_attn.o_proj", *_QKV, along=("self_attn.gate_proj",)), _GATED)),
}
"""Language models that exist only inside multimodal ones."""

_INSIDE = {
    "model.language_model": """
        gemma3 shieldgemma2 llava llava_next llava_next_video llava_onevision video_llava vipllava mistral3 paligemma
        internvl got_ocr2 pp_chart2table aya_vision cohere2_vision deepseek_vl deepseek_vl_hybrid janus
        qwen2_vl qwen2_5_vl qwen2_5_omni_thinker qwen3_vl qwen3_vl_moe qwen3_omni_moe_thinker qwen3_5 qwen3_5_moe
        kimi_k25 lfm2_vl lfm3_vl glm4v glm46v glmga glm4v_moe exaone4_5 hyperclovax_vision_v2 lighton_ocr qianfan_ocr
        minicpm_ocr minicpmv4_6 minicpmv4_7 ovis2 video_llama_3 fast_vlm perception_lm aria cosmos3_edge cosmos3_omni
        molmo2 muse_glimmer muse_spark unlimited_ocr minimax_m3_vl hunyuan_vl paddleocr_vl glm_ocr granite4_vision
        cohere_compass fuyu gemma4 gemma4_unified step3p7 deepseek_ocr2""",
    "model.text_model": "smolvlm idefics2 idefics3 granite_docling",
    "language_model.model": "llama4 nemotron_h_omni",
}

MULTIMODAL: dict[str, str] = {family: module for module, families in _INSIDE.items() for family in families.split()}
"""Models with a language model of the tables inside, and the module that it is; all else in them stays."""
