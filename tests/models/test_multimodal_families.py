"""Every multimodal family of the table: what lies outside the decoder layers stays as it is, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

import slimgpt
from slimgpt.models.build import stock_class
from slimgpt.models.families import MULTIMODAL
from slimgpt.models.lookup import lookup
from tests.models.families import COMMON, OWN, windows
from tests.models.mixtures import GEMMA4, OWN_OF_MIXTURES, ROUTED

DEPTHS = ("num_hidden_layers", "depth", "num_layers", "vt_num_hidden_layers", "encoder_layers", "num_global_layers")
LIKE = {
    "qwen3_5_text": "qwen3_5_text", "qwen3_5_moe_text": "qwen3_5_moe_text", "gemma4_text": "gemma4_text/experts",
    "qwen3_vl_moe_text": "mellum", "qwen3_omni_moe_text": "qwen3_moe",
    "glm4v_moe_text": "glm4_moe", "lfm2": "lfm2", "deepseek_v3": "deepseek_v3", "deepseek_v2": "deepseek_v2",
    "mistral4": "mistral4", "nemotron_h": "nemotron_h", "llama4_text": "llama4_text", "aria_text": "aria_text",
}  # fmt: skip
"""Families whose tiny configs those of the language models inside are like."""


MROPE = (
    "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text",
    "paddleocr_vl_text",
)  # fmt: skip
"""Language models whose positions have three parts, which add up to half of what is rotated of a head."""

PARTS_OF_THEIR_OWN = {
    "step3p5": {"sliding_window": 5},
    "unlimited_ocr_text": {**ROUTED, "num_key_value_heads": 6},
    "gemma4_unified_text": GEMMA4,
}

MOST = 450_000_000
"""Parameters of the largest model that is built, nearly all of its vision part."""

NOT_TINY = {
    "fast_vlm": "its vision part needs timm",
    "perception_lm": "its vision part needs timm",
    "granite4_vision": "its default config builds no model",
    "cohere_compass": "its default config builds no model",
    "molmo2": "its default config names layers of the vision part, which is large",
    "muse_spark": "its default config lists sizes by layer of the vision part",
    "hunyuan_vl": "its default config has no sections of positions",
    "cosmos3_edge": "its config checks sections of positions against the size of a head",
    "granite_docling": "its config checks parts of the vision part against the language model",
    "nemotron_h_omni": "its config checks parts of the vision part against each other",
    "deepseek_ocr2": "its vision part is large by default",
}


def tiny_text(text):
    """The values of a tiny language model of the type of ``text``."""
    own = {**OWN, **OWN_OF_MIXTURES, **PARTS_OF_THEIR_OWN}.get(LIKE.get(text.model_type, text.model_type), {})
    values = {**COMMON, "tie_word_embeddings": False, **own}
    if text.model_type in MROPE:
        partial = (text.rope_parameters or {}).get("partial_rotary_factor", 1.0)
        sections = [int(4 * partial) - 2 * int(partial), int(partial), int(partial)]
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, "partial_rotary_factor": partial}
        values |= {"head_dim": 8, "rope_parameters": rope}
    return {"model_type": text.model_type, **{key: value for key, value in values.items() if value is not None}}


def tiny(model_type):
    """A model of a family whose language model is tiny, and whose other parts are as by default, but shallow."""
    default = AutoConfig.for_model(model_type)
    text = default.get_text_config(decoder=True)
    values = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is text:
            values[name] = tiny_text(text)
        elif part is not None:
            shallow = {key: 1 for key in DEPTHS if isinstance(getattr(part, key, None), int)}
            values[name] = {"model_type": part.model_type, **shallow}
    config = AutoConfig.for_model(model_type, **values)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    with torch.device("meta"):
        assert stock_class(config)(config).num_parameters() < MOST
    return stock_class(config)(config).float().eval()


def cases():
    marks = [pytest.mark.families, pytest.mark.slow]
    return [pytest.param(model_type, marks=marks) for model_type in MULTIMODAL if model_type not in NOT_TINY]


@pytest.mark.parametrize("name", cases())
def test_what_is_no_decoder_layer_stays(name):
    model = tiny(name)
    layers = lookup(model.config).layers
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = slimgpt.prune(model, None, 0.15, windows() % 90, device="cpu", distill=False, allocation="schedule")
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {key for key, tensor in before.items() if not torch.equal(after[key], tensor)}
    assert changed
    assert all(key.startswith(f"{layers}.") for key in changed)
    assert any(not key.startswith(f"{layers}.") for key in after)
    assert report.plan.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_those_without_a_tiny_model_are_in_the_table():
    assert set(NOT_TINY) <= set(MULTIMODAL)
