"""Gemma 4 E2B and E4B: every layer reads embeddings of the tokens, the last ones keys and values of earlier ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import slimgpt
from slimgpt.config import make_config
from slimgpt.errors import PlanError
from slimgpt.layerwise.capture import capture
from slimgpt.layerwise.shared_states import arguments_width, shared_states, stream_width
from slimgpt.models.build import stock_class
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.engines import engine_support
from slimgpt.planning.planner import make_plan
from slimgpt.pruning.memory_estimate import memory_need
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import BORROWING, COMMON, in_a_process_without_slimgpt, tiny_model, windows
from tests.pipeline.test_dense_comparison import check, texts_of

IDS = windows(2, 24, seed=7)
SMALL = {"hidden_size_per_layer_input": 256, "global_head_dim": 512, "sliding_window": 512, "head_dim": 256}
SIZES = {
    "E2B": {
        "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8,
        "num_key_value_heads": 1, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    },
    "E4B": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18, "use_double_wide_mlp": False,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
    },
}  # fmt: skip
PUBLISHED = {"E2B": (5.1e9, 2.3e9), "E4B": (8.0e9, 4.5e9)}
"""Parameters with and without embeddings, as the model card names them."""

TINY = {
    "vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "position_embedding_size": 16,
    },
    "audio_config": {
        "model_type": "gemma4_audio", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "output_proj_dims": 24, "subsampling_conv_channels": [8, 4],
    },
}  # fmt: skip

RELOAD = """
import json, sys
sys.modules["slimgpt"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
ids, folder = torch.tensor(json.loads(sys.argv[2])), sys.argv[3]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
outputs = {}
with torch.no_grad():
    outputs["logits"] = model(input_ids=ids).logits.contiguous()
    for cache in (True, False):
        outputs[str(cache)] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache
        )
save_file(outputs, sys.argv[1])
"""


@pytest.fixture(scope="module")
def shell():
    """A tiny multimodal model with vision and audio parts."""
    text = {key: value for key, value in {**COMMON, **BORROWING}.items() if value is not None}
    text |= {"model_type": "gemma4_text", "use_double_wide_mlp": True, "pad_token_id": 0}
    special = {name: 90 + place for place, name in enumerate(("boi", "eoi", "boa", "image", "video", "audio"))}
    config = AutoConfig.for_model(
        "gemma4", text_config=text, **TINY, **{f"{name}_token_id": token for name, token in special.items()}
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = stock_class(config)(config).float().eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("_min", "_max")):  # limits of the audio part's numbers: none, in a model without weights
            buffer.fill_(-100.0 if name.endswith("_min") else 100.0)
    return model


@pytest.mark.parametrize("name", SIZES)
def test_published_numbers_of_parameters(name):
    text = {"model_type": "gemma4_text", **SMALL, **SIZES[name]}
    parts = {f"{part}_config": {"model_type": f"gemma4_{part}"} for part in ("vision", "audio")}
    config = AutoConfig.for_model("gemma4", text_config=text, **parts)
    with torch.device("meta"):
        model = stock_class(config)(config)
    shape = describe(config, model)
    whole, effective = PUBLISHED[name]
    per_layer = model.get_submodule("model.language_model.embed_tokens_per_layer").weight.numel()
    tokens = model.get_input_embeddings().weight.numel()
    assert shape.parameters == model.num_parameters()
    assert shape.parameters == pytest.approx(whole, rel=0.02)
    assert shape.parameters - per_layer - tokens == pytest.approx(effective, rel=0.07)
    width = SIZES[name]["intermediate_size"]
    own = len(shape.layers) - SIZES[name]["num_kv_shared_layers"]
    wide = {width * (2 if name == "E2B" else 1)}
    assert {sizes["intermediate_size"] for sizes in layer_sizes(config)[:own]} == {width}
    assert {sizes["intermediate_size"] for sizes in layer_sizes(config)[own:]} == wide
    # The keys and values of one layer of every kind: KV heads of 256 and of 512 numbers.
    carried = 2 * SIZES[name]["num_key_value_heads"] * (256 + 512)
    assert stream_width(config) == SIZES[name]["hidden_size"] + carried
    assert arguments_width(config) == len(shape.layers) * 256


def test_captured_arguments_differ_by_batch_and_what_is_carried_ends_with_the_last_layer():
    model = tiny_model("gemma4_text/shared")
    stream = capture(model, model.model.layers, IDS, 1, ActivationStore("device", torch.device("cpu")))
    own = model.model.project_per_layer_inputs(
        model.model.embed_tokens(IDS), model.model.get_per_layer_inputs(IDS)
    ).detach()  # (batch, seq_len, layers, size)
    for number in range(2):
        assert len(stream.arguments[number]) == 4
        for index, arguments in enumerate(stream.arguments[number]):
            torch.testing.assert_close(arguments["per_layer_input"], own[number : number + 1, :, index])
    with pytest.raises(IndexError):
        stream.arguments[0][4]
    kinds = [(len(each.before), len(each.after)) for each in shared_states(model.config)]
    assert kinds == [(0, 1), (1, 2), (2, 2), (2, 0)]


def test_keys_and_values_come_back_as_they_were_carried():
    layout = shared_states(tiny_model("gemma4_text/shared").config)[1]
    shapes = {"sliding_attention": (2, 3, 5, 10), "full_attention": (2, 3, 5, 14)}
    states = {key: (torch.randn(shape), torch.randn(shape)) for key, shape in shapes.items()}
    hidden = torch.randn(2, 5, 48)
    packed = layout.pack(hidden, states)
    assert packed.shape == (2, 5, 48 + 2 * 3 * (10 + 14))
    again, back = shared_states(tiny_model("gemma4_text/shared").config)[2].unpack(packed)
    assert torch.equal(again, hidden)
    assert all(torch.equal(one, two) for key in states for one, two in zip(states[key], back[key], strict=True))


def test_memory_counts_what_is_carried_and_what_layers_read():
    need, alone = (
        memory_need(model, windows(), make_plan(model.config, 0.1), make_config(ratio=0.1), None, False)
        for model in (tiny_model("gemma4_text/shared"), tiny_model("gemma4_text/embedded"))
    )
    tokens = windows().numel() * 4
    assert need.stream == tokens * (48 + 2 * 3 * (10 + 14))
    assert alone.stream == tokens * 48
    assert need.arguments == alone.arguments == tokens * 4 * 8


def test_what_is_left_out_is_said():
    model = tiny_model("gemma4_text/shared")
    with pytest.raises(PlanError, match="heads of 'gemma4_text' cannot be removed"):
        slimgpt.prune(model, None, 0.1, head_unit="kv", calibration=windows(), device="cpu")
    with pytest.raises(PlanError, match="speedup: its last layers attend to keys and values of earlier ones"):
        slimgpt.prune(model, None, speedup=1.1, calibration=windows(), device="cpu")
    with pytest.raises(PlanError, match="differ in width"):
        slimgpt.prune(model, None, 0.1, uniform=True, calibration=windows(), device="cpu")
    (vllm,) = engine_support(model.config, layer_sizes(model.config), ["vllm"])
    assert not vllm.runs
    assert "has not been run" in vllm.how


@pytest.mark.slow
def test_a_folder_with_vision_and_audio_is_pruned_layer_by_layer(shell, tokenizer, text_file, tmp_path):
    """With matrices of keys and values in the files that no layer reads, as the published ones have them."""
    shell.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.language_model.layers.2.self_attn.k_proj.weight"] = torch.zeros(30, 48)
    save_file(tensors, file, metadata={"format": "pt"})
    options = {"calibration": str(text_file), "num_samples": 12, "seq_len": 24, "device": "cpu"}
    with other_thresholds(step_tokens=144):
        report = slimgpt.prune_folder(
            str(tmp_path / "dense"), tmp_path / "slim", 0.1, **options, distill=288, allocation="sensitivity"
        )
    dense, loaded = slimgpt.load(str(tmp_path / "dense"))
    slim, _ = slimgpt.load(str(tmp_path / "slim"))
    assert report.distillation["steps"] > 0
    assert report.allocation["divergence"] > 0
    layers, before = lookup(dense.config).layers, dense.state_dict()
    for key, tensor in slim.state_dict().items():
        if not key.startswith(f"{layers}."):
            assert torch.equal(tensor, before[key]), key
    assert any("audio_tower" in key for key in before)
    assert any("vision_tower" in key for key in before)
    config = json.loads((tmp_path / "slim" / "config.json").read_text())["text_config"]
    assert config["use_double_wide_mlp"] is False
    outputs = in_a_process_without_slimgpt(tmp_path, RELOAD, IDS % 90, [str(tmp_path / "slim")])
    slim.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(outputs["logits"], slim(input_ids=IDS % 90).logits)
    assert torch.equal(outputs["True"], outputs["False"])
    measured = {"ratio": 0.1, "num_samples": 12, "seq_len": 24, "distill": 288}
    check(report.to_json(), dense, slim, texts_of(loaded, text_file, measured))
    # The same as the model pruned in memory.
    with other_thresholds(step_tokens=144):
        slimgpt.prune(dense, tokenizer, 0.1, **options, distill=288, allocation="sensitivity")
    with torch.no_grad():
        torch.testing.assert_close(
            slim(input_ids=IDS % 90).logits, dense(input_ids=IDS % 90).logits, rtol=1e-3, atol=1e-3
        )
