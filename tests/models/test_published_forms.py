"""Forms of config.json that repositories have: planned as what they are, or refused for what is true of them."""

from __future__ import annotations

import json

import pytest

from slimgpt.checkpoint.convert import LAYOUTS
from slimgpt.errors import SlimGPTError
from slimgpt.models.build import empty_model
from slimgpt.models.families.moe import EXPERTS
from slimgpt.models.loading import CONVERTIBLE, load_config
from slimgpt.models.parameter_counts import describe
from slimgpt.models.source import locate
from slimgpt.models.unknown_tensors import unknown_tensors

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
}  # fmt: skip
JAMBA = {
    **SIZES, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts_per_tok": 2, "expert_layer_period": 2,
    "expert_layer_offset": 0, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip
HUNYUAN = {**SIZES, "head_dim": 16, "num_experts": 4, "rope_theta": 1e4}


def shape_of(tmp_path, model_type, **values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **values}), encoding="utf-8")
    config = load_config(locate(str(tmp_path)))
    return config, describe(config, empty_model(config))


def test_jamba_with_and_without_experts(tmp_path):
    _, shape = shape_of(tmp_path, "jamba", **JAMBA, num_experts=4)
    assert [EXPERTS in layer.sizes for layer in shape.layers] == [True, False, True, False]
    _, shape = shape_of(tmp_path, "jamba", **JAMBA, num_experts=1)
    assert not any(EXPERTS in layer.sizes for layer in shape.layers)


def test_numbers_that_hunyuan_lists_by_layer(tmp_path):
    _, listed = shape_of(tmp_path, "hunyuan_v1_moe", **HUNYUAN, moe_topk=[2] * 4)
    _, single = shape_of(tmp_path, "hunyuan_v1_moe", **HUNYUAN, moe_topk=2)
    assert listed == single
    assert listed.layers[0].experts.least == 2


def test_llama_4_without_experts(tmp_path):
    text = {**SIZES, "model_type": "llama4_text", "head_dim": 16, "intermediate_size_mlp": 112, "moe_layers": []}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    _, shape = shape_of(tmp_path, "llama4", text_config=text, vision_config=vision)
    assert {layer.sizes["intermediate_size"] for layer in shape.layers} == {112}


def test_mimo_is_qwen2_with_layers_that_predict_a_second_token(tmp_path):
    with pytest.warns(UserWarning, match="is a mimo"):
        config, _ = shape_of(tmp_path, "mimo", **SIZES, num_nextn_predict_layers=1)
    assert config.model_type == "qwen2"
    names = ["model.mtp_layers.0.input_proj.weight", "model.layers.0.other.weight"]
    assert unknown_tensors(empty_model(config), names) == names[1:]


def test_a_head_that_no_file_ties_is_counted(tmp_path):
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SIZES, "model_type": "mistral"}
    untied = {key: value for key, value in text.items() if key != "tie_word_embeddings"}
    _, silent = shape_of(tmp_path, "mistral3", text_config=untied, vision_config=vision)
    _, tied = shape_of(tmp_path, "mistral3", text_config=untied, vision_config=vision, tie_word_embeddings=True)
    assert silent.parameters - tied.parameters == 128 * 64


CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
REFUSED = {
    "flat llava": ("llava", {**SIZES, "mm_hidden_size": 1024}, "reads it from text_config"),
    "mlx": ("qwen3", {**SIZES, "quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits.*--dequantize"),
    "mlx twice": ("qwen3", {**SIZES, "quantization_config": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
    "sound": ("voxtral", {"text_config": {"model_type": "llama"}}, "takes sound"),
    "omni": ("qwen2_5_omni", {}, "the thinker"),
    "no class": ("deberta-v2", {"hidden_size": 768}, "no class for model_type 'deberta-v2'"),
    "code": ("chatglm", {"auto_map": CODE}, "--trust-remote-code, and a layout .* must be described first"),
    "code of Llama's layout": ("internlm2", {"auto_map": CODE}, "slimgpt convert .* OUT"),
    "code without a causal model": ("Dream", {"auto_map": {"AutoModel": "m.Dream"}}, "names no AutoModelForCausalLM"),
    "no experts per token": (
        "deepseek_v2", {"num_hidden_layers": 2, "n_routed_experts": 4}, "num_experts_per_tok .* is None",
    ),
    "a missing value": ("nemotron", {**SIZES, "num_key_value_heads": None}, "null or missing in config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_why_and_what_helps(name, tmp_path):
    model_type, values, reason = REFUSED[name]
    with pytest.raises(SlimGPTError, match=f"(?s){reason}"):
        shape_of(tmp_path, model_type, **values)


def test_what_can_be_converted_is_what_convert_knows():
    assert tuple(LAYOUTS) == CONVERTIBLE
