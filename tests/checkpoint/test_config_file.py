"""What other readers find in the config.json of a slim folder, and what transformers makes of it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel

import slimgpt
from slimgpt.checkpoint.config_file import legacy_fields, write_config
from tests.models.families import tiny_config, tiny_model, windows

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
IDS = windows(4, 24)


@pytest.mark.parametrize(
    "rope",
    [None, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, SCALED],
    ids=["plain", "linear", "llama3"],
)
def test_rotary_settings_are_in_the_old_place_too_and_the_config_is_read_back_as_it_was(rope, tmp_path):
    config = tiny_config("llama")
    config.dtype = torch.float32
    if rope is not None:
        config.rope_parameters = rope
    write_config(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_theta"] == config.rope_parameters["rope_theta"]
    assert values["torch_dtype"] == "float32"
    assert values["head_dim"] == config.head_dim
    assert ("rope_scaling" in values) == (rope is not None)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert (again.dtype, again.head_dim) == (config.dtype, config.head_dim)


def test_both_rotary_bases_of_gemma_3_have_their_old_names(tmp_path):
    config = tiny_config("gemma3_text")
    write_config(config, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    rope = config.rope_parameters
    assert values["rope_theta"] == rope["full_attention"]["rope_theta"]
    assert values["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
    assert legacy_fields({"model_type": "mamba"}) == {}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_slim_folder_loads_as_a_model_without_a_head(family, tmp_path):
    """As engines build it that bring a head of their own: from the config, then the weights of the folder."""
    model = tiny_model(family)
    report = slimgpt.prune(model, None, 0.3, IDS, device="cpu", distill="off")
    slimgpt.save(model, None, report, tmp_path / "slim")
    assert len({tuple(layer.items()) for layer in report.plan.layers}) > 1
    inner, info = AutoModel.from_pretrained(
        tmp_path / "slim", trust_remote_code=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(inner(IDS).last_hidden_state, expected)
    config = AutoConfig.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    built = AutoModel.from_config(config, trust_remote_code=True).state_dict()
    assert {name: tensor.shape for name, tensor in built.items()} == {
        name: tensor.shape for name, tensor in inner.state_dict().items()
    }
    assert not type(inner).__init__.__annotations__
