"""Tiny random models of every family: unequal numbers, biases, random norms, windows shorter than the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from slimgpt.models import ARCHITECTURES
from slimgpt.models.build import stock_class
from slimgpt.models.families.mixtures import MIXTURES
from slimgpt.models.loading import load_config, load_model
from slimgpt.models.parameter_counts import describe
from slimgpt.models.source import locate
from slimgpt.planning.plan import plan_of_widths, with_heads
from slimgpt.planning.plan_file import to_toml
from slimgpt.planning.planner import make_plan

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

LATENT_HEADS: dict[str, Any] = {
    "intermediate_size": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 14,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 9,
}
"""Multi-head latent attention."""

HYBRID = ["linear_attention", "full_attention"] * (LAYERS // 2)
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 96}

BORROWING: dict[str, Any] = {
    "layer_types": ALTERNATING, "sliding_window": 5, "global_head_dim": 14, "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
}  # fmt: skip
"""Gemma 4 as its small models have it: the last layers attend to keys and values of earlier ones."""

FILLED: dict[str, Any] = {"head_dim": None, "num_key_value_heads": None}
"""For families whose heads fill the hidden size."""

OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5, "tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "layer_types": ALTERNATING, "head_dim": 8},
    "qwen3": {"attention_bias": True},
    "gemma2": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 10},
    "gemma3_text": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 10},
    "gemma3_text/scaled-positions": {
        "sliding_window": 5,
        "layer_types": ALTERNATING,
        "query_pre_attn_scalar": 10,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "granite": {"attention_bias": True, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "head_dim": None},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "head_dim": None},
    "phi3": {"head_dim": None, "sliding_window": 7, "num_attention_heads": 6, "tie_word_embeddings": False},
    "ministral": {"sliding_window": 5, "layer_types": ALTERNATING},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 5, "layer_types": ALTERNATING},
    "exaone4": {"sliding_window": 5, "layer_types": ALTERNATING},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "vaultgemma": {"sliding_window": 5, "layer_types": ALTERNATING, "query_pre_attn_scalar": 10},
    "cwm": {"sliding_window": 5, "layer_types": ALTERNATING, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "helium": {"head_dim": 8},
    "cohere": {"attention_bias": True},
    "cohere/qk-norm": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 5, "layer_types": ALTERNATING},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "apertus": {"attention_bias": True},
    "starcoder2": {"use_bias": True, "sliding_window": 6},
    "granite_swa": {"sliding_window": 5, "layer_types": ALTERNATING},
    "gptj/default-width": {**FILLED, "rotary_dim": 4, "tie_word_embeddings": False},
    "phi": {"head_dim": 12},
    "phi/qk-norm": {"qk_layernorm": True, "head_dim": None},
    "stablelm": {"head_dim": None, "use_qkv_bias": True, "use_parallel_residual": True},
    "stablelm/qk-norm": {"head_dim": None, "qk_layernorm": True},
    "persimmon": FILLED,
    "gpt_neox": {**FILLED, "rotary_pct": 0.5},
    "minicpm3": {**LATENT_HEADS, "q_lora_rank": 20},
    "youtu": {**LATENT_HEADS, "q_lora_rank": 20},
    "gptj": {**FILLED, "n_inner": 52, "rotary_dim": 4},
    "codegen": {**FILLED, "num_attention_heads": 8, "n_inner": 52, "rotary_dim": 4},
    "gpt_neo": {**FILLED, "attention_types": [[["global", "local"], 2]], "window_size": 5, "num_layers": 4},
    "gpt2": {**FILLED, "n_inner": 52, "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": {**FILLED, "n_inner": 52},
    "gpt_bigcode/multi-head": {**FILLED, "n_inner": 52, "multi_query": False},
    "falcon": {**FILLED, "ffn_hidden_size": 52, "new_decoder_architecture": True, "num_kv_heads": 3, "bias": True},
    "falcon/multi-query": {**FILLED, "ffn_hidden_size": 52, "multi_query": True},
    "falcon/multi-head": {**FILLED, "ffn_hidden_size": 52, "multi_query": False, "parallel_attn": False},
    "falcon/alibi": {**FILLED, "ffn_hidden_size": 52, "multi_query": False, "alibi": True},
    "bloom": {**FILLED, "intermediate_size": None},
    "mpt": {**FILLED, "intermediate_size": None, "max_seq_len": 64},
    "opt": {**FILLED, "ffn_dim": 52, "word_embed_proj_dim": 40},
    "xglm": {**FILLED, "ffn_dim": 52},
    "biogpt": FILLED,
    "llama4_text/dense": {
        "moe_layers": [],
        "num_local_experts": 1,
        "intermediate_size_mlp": 52,
        "attention_chunk_size": 8,
    },
    "qwen3_5_text": {"layer_types": HYBRID, **LINEAR},
    "falcon_h1": MAMBA,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "head_dim": 8,
        "pad_token_id": 0,
    },
    "olmo_hybrid": {"layer_types": HYBRID, "head_dim": 8, "pad_token_id": 0},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 52,
        "head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "head_dim": 8, "block_multiple_of": 7},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2, "pad_token_id": 0},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "lru_width": 48,
        "attention_window_size": 16,
        "head_dim": 8,
        "intermediate_size": 104,
    },
    "modernbert-decoder": {
        **FILLED,
        "local_attention": 12,
        "layer_types": ALTERNATING,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
    },
    "diffllama": {"head_dim": 8, "num_attention_heads": 6, "num_key_value_heads": 2},
    "gemma4_text/shared": {**BORROWING, "use_double_wide_mlp": True},
    "gemma4_text/shared-equal": {**BORROWING, "num_key_value_heads": 2},
    "gemma4_text/embedded": {**BORROWING, "num_kv_shared_layers": 0},
}
"""What differs from :data:`COMMON` in a family's tiny model; ``None`` leaves a field out."""


CORE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite", "smollm3", "phi3")
"""Families that every format and engine is tried with."""

HYBRIDS = (
    "qwen3_5_text", "falcon_h1", "jamba", "granitemoehybrid", "lfm2", "lfm3", "recurrent_gemma",
)  # fmt: skip
"""Families with parts that stay, so that less of a layer can go."""

REPRESENTATIVE = (
    "llama", "qwen2", "gemma3_text", "phi3", "olmo2", "granite_swa", "gpt2", "opt", "gpt_neox", "falcon/multi-query",
)  # fmt: skip
"""One or two of every layout; the default run has these, `pytest -m families` all."""

NAMES = [
    *(family for family in ARCHITECTURES if family not in MIXTURES),
    *(name for name in OWN if "/" in name or name in MIXTURES),
]
"""Every family without experts, and the variants of layout that a flag of its config chooses; see mixtures.py too."""


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model.

    Args:
        name: a family, or a key of :data:`OWN`: a family and a variant of its layout.
        changes: fields that differ; ``None`` leaves one out.
    """
    wanted = {**COMMON, **OWN.get(name, {}), **changes}
    values = {key: value for key, value in wanted.items() if value is not None}
    values = {**dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")), **values}
    return AutoConfig.for_model(name.partition("/")[0], **values)


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in fp32, every parameter drawn, norms and biases too; arguments as :func:`tiny_config`."""
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = stock_class(config)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 + 0.4 * noise if "norm" in name else noise * (0.6 / parameter.shape[-1] ** 0.5 + 0.05))
    return model


def sharpened_model(factor: float, **changes: Any) -> PreTrainedModel:
    """A tiny Llama in eval mode whose layers say more, every matrix being ``factor`` times as large."""
    model = tiny_model("llama", **changes)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(factor)
    return model.eval()


def grouped_config(num_hidden_layers: int) -> MistralConfig:
    """Six query heads on three KV heads, and an FFN of 100 channels."""
    return MistralConfig(
        hidden_size=32, num_hidden_layers=num_hidden_layers, num_attention_heads=6, num_key_value_heads=3,
        intermediate_size=100, head_dim=8, vocab_size=50,
    )  # fmt: skip


def windows(num_samples: int = 12, seq_len: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids ``(num_samples, seq_len)``."""
    return torch.randint(VOCABULARY, (num_samples, seq_len), generator=torch.Generator().manual_seed(seed))


def plan_without(model: PreTrainedModel, folder: Path, ratio: float = 0.2) -> Path:
    """A plan file that takes the attention of every layer that can do without, and narrows the others."""
    shape = describe(model.config, model)
    plan = make_plan(model.config, ratio, shape=shape)
    layers = [
        with_heads(layer, plan.head_unit, 0, {"intermediate_size": sizes["intermediate_size"]})
        if layer.attention_parameters
        else dict(sizes)
        for layer, sizes in zip(shape.layers, plan.layers)
    ]
    file = folder / "plan.toml"
    file.write_text(to_toml(plan_of_widths(shape, layers, plan.head_unit), model.config.model_type))
    return file


def assert_loads_to_the_bit(folder: Path, model: PreTrainedModel, ids: torch.Tensor) -> None:
    """The folder holds what ``model``, a model with eager attention, computes."""
    source = locate(str(folder))
    again = load_model(source, load_config(source))
    again.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def in_a_process_without_slimgpt(root: Path, source: str, ids: torch.Tensor, folders: list[str]) -> dict[str, Any]:
    """What the script ``source`` saves of these model folders; it is given a file to write, ids as JSON and folders."""
    script, out = root / "reload.py", root / "out.safetensors"
    script.write_text(source)
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_MODULES_CACHE": str(root / "modules")}
    command = [sys.executable, str(script), str(out), json.dumps(ids.tolist()), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)
