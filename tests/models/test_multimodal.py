"""The language model inside a multimodal model: pruned in place, all else untouched, saved and loaded again whole."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import slimgpt
from slimgpt.models.build import stock_class
from slimgpt.models.lookup import lookup, text_config
from tests.models.families import COMMON, windows

IDS = windows(2, 24, seed=7)
TEXT = {key: value for key, value in COMMON.items() if value is not None and key != "attn_implementation"}
VISION = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
CONFIGS = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **TEXT, "sliding_window": 5, "query_pre_attn_scalar": 10},
        "vision_config": {"model_type": "siglip_vision_model", **VISION, **IMAGE},
        "mm_tokens_per_image": 4,
        "image_token_index": 95, "boi_token_index": 93, "eoi_token_index": 94,
    },
    "llava": {
        "text_config": {"model_type": "llama", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "clip_vision_model", **VISION, **IMAGE, "projection_dim": 24},
        "image_token_index": 96, "vision_feature_layer": -1, "image_seq_length": 4,
    },
    "qwen2_5_vl": {
        "text_config": {
            "model_type": "qwen2_5_vl_text", **TEXT, "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {
            "depth": 2, "hidden_size": 24, "intermediate_size": 28, "num_heads": 2, "out_hidden_size": 48,
            "patch_size": 8, "fullatt_block_indexes": [1],
        },
        "image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **TEXT, "head_dim": 8},
        "vision_config": {"model_type": "smolvlm_vision", **VISION, **IMAGE},
        "image_token_id": 96, "scale_factor": 2,
    },
}  # fmt: skip

RELOAD = """
import json, sys
sys.modules["slimgpt"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
out, ids, outputs = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), {}
for folder in sys.argv[3:]:
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=not folder.endswith("uniform"), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        outputs[folder.rsplit("/", 1)[1]] = model(input_ids=ids).logits.contiguous()
save_file(outputs, out)
"""


def multimodal(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(CONFIGS[model_type]))
    config._attn_implementation = "eager"
    model = stock_class(config)(config).float().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(0.3 + 0.4 * noise if "norm" in name else noise * (0.6 / parameter.shape[-1] ** 0.5 + 0.05))
    return model


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Every model before and after, its folder, and the logits that a process without slimgpt computes from it."""
    root, models = tmp_path_factory.mktemp("multimodal"), {}
    for model_type in CONFIGS:
        for form in ("layers", "uniform"):
            model = multimodal(model_type)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            report = slimgpt.prune(model, None, 0.3, windows() % 90, device="cpu", uniform=form == "uniform")
            slimgpt.save(model, None, report, root / f"{model_type}-{form}")
            models[f"{model_type}-{form}"] = model, before, report
    (root / "reload.py").write_text(RELOAD)
    command = [sys.executable, str(root / "reload.py"), str(root / "out"), json.dumps((IDS % 90).tolist())]
    done = subprocess.run([*command, *(str(root / n) for n in models)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, models, load_file(root / "out")


@pytest.mark.parametrize("form", ["layers", "uniform"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_language_model_is_pruned_and_the_rest_stays(model_type, form, pruned):
    root, models, logits = pruned
    name = f"{model_type}-{form}"
    model, before, report = models[name]
    assert report.plan.parameters == sum(p.numel() for p in model.parameters())
    assert report.plan.achieved > 0.28
    layers = lookup(model.config).layers
    for key, tensor in model.state_dict().items():
        if not key.startswith(f"{layers}."):
            assert torch.equal(tensor, before[key]), key
    with torch.no_grad():
        assert torch.equal(logits[name], model(input_ids=IDS % 90).logits)
    assert (root / name / "modeling_slim.py").is_file() == (form == "layers")
    config = AutoConfig.from_pretrained(root / name)
    assert type(config) is type(model.config)
    assert text_config(config).is_heterogeneous == (form == "layers")


def test_images_still_reach_the_pruned_model():
    model = multimodal("llava")
    ids = IDS[:1] % 90
    ids[0, 2:6] = 96
    images = torch.randn(2, 1, 3, 16, 16)
    slimgpt.prune(model, None, 0.3, windows() % 90, device="cpu")
    with torch.no_grad():
        first, second = (model(input_ids=ids, pixel_values=image).logits for image in images)
    assert float((first - second).abs().max()) > 1e-3


def test_streamed_from_files_with_its_processor(tmp_path, tokenizer, text_file):
    model = multimodal("llava")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    options = {"calibration": str(text_file), "num_samples": 6, "seq_len": 24, "device": "cpu"}
    slimgpt.prune_folder(str(tmp_path / "dense"), tmp_path / "slim", 0.3, **options)
    slim, _ = slimgpt.load(str(tmp_path / "slim"))
    dense, dense_tokenizer = slimgpt.load(str(tmp_path / "dense"))
    slimgpt.prune(dense, dense_tokenizer, 0.3, **options)
    with torch.no_grad():
        torch.testing.assert_close(slim(input_ids=IDS).logits, dense(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "slim" / "preprocessor_config.json").is_file()
