"""The names that people know models by, for looking up their families."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from slimgpt.errors import UsageError

_MODELS = {
    "llama": "LLaMA; Llama 2; Llama 3, 3.1, 3.2 and 3.3; DeepSeek LLM; Yi; TinyLlama; SmolLM; SmolLM2; Vicuna",
    "llama4": "Llama 4 Scout; Llama 4 Maverick; Llama Guard 4",
    "mllama": "Llama 3.2 11B and 90B Vision",
    "mistral": "Mistral 7B; Mistral Nemo; Mistral Small 2",
    "mistral3": "Mistral Small 3.1; Mistral Small 3.2; Mistral Small 4; Magistral; Devstral Small 2; Ministral 3",
    "mistral4": "Mistral Small 4, its language model",
    "ministral": "Ministral 8B",
    "ministral3": "Devstral 2 123B; Ministral 3, its language model",
    "mixtral": "Mixtral 8x7B; Mixtral 8x22B",
    "qwen2": "Qwen1.5; Qwen2; Qwen2.5; QwQ; DeepSeek-R1-Distill-Qwen; MiMo-7B (mimo)",
    "qwen2_moe": "Qwen1.5-MoE; Qwen2-57B-A14B",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL; MiMo-VL",
    "qwen2_5_omni": "Qwen2.5-Omni",
    "qwen3_omni_moe": "Qwen3-Omni-30B-A3B",
    "qwen2_audio": "Qwen2-Audio",
    "voxtral": "Voxtral",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_moe": "Qwen3-30B-A3B; Qwen3-235B-A22B; Qwen3-Coder",
    "qwen3_next": "Qwen3-Next-80B-A3B; Qwen3-Coder-Next",
    "qwen3_vl": "Qwen3-VL 2B to 32B",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B; Qwen3-VL-235B-A22B",
    "qwen3_5": "Qwen3.5, dense; Qwen3.6, dense",
    "qwen3_5_moe": "Qwen3.5-35B-A3B; Qwen3.5-122B-A10B; Qwen3.5-397B-A17B; Qwen3.6-35B-A3B",
    "gemma": "Gemma 1",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M; Gemma 3 1B",
    "gemma3": "Gemma 3 4B; Gemma 3 12B; Gemma 3 27B",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "phi": "Phi-1; Phi-2",
    "phi3": "Phi-3; Phi-3.5-mini; Phi-4; Phi-4-mini",
    "phimoe": "Phi-3.5-MoE",
    "phi4_multimodal": "Phi-4-multimodal",
    "gpt_oss": "gpt-oss-20b; gpt-oss-120b",
    "deepseek_v2": "DeepSeek-V2; DeepSeek-V2.5; DeepSeek-Coder-V2",
    "deepseek_v3": "DeepSeek-V3; DeepSeek-V3.1; DeepSeek-R1; Kimi-K2 (kimi_k2); Moonlight",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "kimi_k25": "Kimi-K2.5; Kimi-K2.6",
    "minimax_m2": "MiniMax-M2; MiniMax-M2.1; MiniMax-M2.5",
    "glm": "GLM-4-9B",
    "glm4": "GLM-4-0414; GLM-Z1",
    "glm4_moe": "GLM-4.5; GLM-4.6; GLM-4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm4v": "GLM-4.1V-Thinking",
    "glm46v": "GLM-4.6V-Flash",
    "glm4v_moe": "GLM-4.5V; GLM-4.6V",
    "glm_moe_dsa": "GLM-5; GLM-5.1",
    "granite": "Granite 3, dense",
    "granitemoe": "Granite 3 with experts",
    "granitemoehybrid": "Granite 4",
    "smollm3": "SmolLM3",
    "smolvlm": "SmolVLM; SmolVLM2",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "nemotron": "Nemotron-4; Minitron",
    "nemotron_h": "Nemotron-H; Nemotron Nano 2; Nemotron 3 Nano; Nemotron 3 Super; Nemotron 3 Ultra",
    "lfm2": "LFM2 350M to 2.6B; LFM2.5-1.2B",
    "lfm2_moe": "LFM2-8B-A1B; LFM2-24B-A2B",
    "lfm2_vl": "LFM2-VL; LFM2.5-VL",
    "afmoe": "Trinity Nano, Mini and Large",
    "apertus": "Apertus",
    "arcee": "AFM-4.5B",
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision",
    "dots1": "dots.llm1",
    "kimi_linear": "Kimi-Linear-48B-A3B",
    "minimax": "MiniMax-Text-01 (-hf)",
    "molmo2": "Molmo2",
    "paligemma": "PaliGemma; PaliGemma 2",
    "solar_open": "Solar-Open-100B",
    "cohere": "Command R; Aya",
    "cohere2": "Command A; Command R7B",
    "exaone4": "EXAONE 4",
    "exaone4_5": "EXAONE 4.5",
    "exaone_moe": "K-EXAONE",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B; ERNIE 4.5 300B-A47B",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "seed_oss": "Seed-OSS 36B",
    "mimo_v2_flash": "MiMo-V2-Flash",
    "step3p7": "Step-3.7-Flash",
    "minicpm3": "MiniCPM3",
    "longcat_flash": "LongCat-Flash",
    "internvl": "InternVL3; InternVL3.5",
    "llava": "LLaVA 1.5; Pixtral 12B",
    "llava_onevision": "LLaVA-OneVision",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM",
    "falcon": "Falcon 7B; Falcon 40B",
    "falcon_h1": "Falcon-H1",
    "jamba": "Jamba 1.5 and 1.7; Jamba Reasoning 3B",
    "gpt_neox": "Pythia; GPT-NeoX; Dolly",
    "bitnet": "BitNet b1.58",
}
"""Model types by what is published of them; not all that is."""

KNOWN_AS: dict[str, tuple[str, ...]] = {kind: tuple(names.split("; ")) for kind, names in _MODELS.items()}
"""Names of published models, by ``model_type``."""


def matching(name: str, model_types: Iterable[str]) -> list[str]:
    """The model types that a name means: the one that it is, or all that it is part of, by their own name or one that
    they are known by; case, hyphens, dots and spaces do not count.

    Raises:
        UsageError: it means none; the message names the nearest.
    """
    known = {kind: [kind, *KNOWN_AS.get(kind, ())] for kind in model_types}
    wanted = _plain(name)
    meant = [kind for kind, names in known.items() if any(wanted in _plain(text) for text in names)]
    if name in known or (wanted and meant):
        return [name] if name in known else meant
    texts = {_plain(text): text for names in known.values() for text in names}
    near = ", ".join(texts[text] for text in get_close_matches(wanted, texts, n=3, cutoff=0.5))
    raise UsageError(
        f"no family is called '{name}'{near and f'; near it: {near}'}; `slimgpt families --refused` lists all, and "
        "config.json says a model's own as model_type"
    )


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())
