"""LoRA adapter folders as MODEL."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

import slimgpt
from slimgpt.errors import ModelError
from tests.models.families import tiny_model, windows

IDS = windows(2, 24, seed=7)
OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu"}


@pytest.fixture
def adapter(dense_folder, tmp_path):
    """An adapter of random weights for the tiny Llama, and the logits of the two together."""
    model = get_peft_model(
        tiny_model("llama"),
        LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    model.peft_config["default"].base_model_name_or_path = str(dense_folder)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS).logits


def test_an_adapter_is_merged_on_the_way_in(adapter):
    folder, expected = adapter
    model, tokenizer = slimgpt.load(str(folder))
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        base, _ = slimgpt.load(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
        assert float((base(IDS).logits - expected).abs().max()) > 0.1
    assert tokenizer("river").input_ids


def test_an_adapter_is_pruned_like_the_merged_model(adapter, text_file, tmp_path):
    folder, _ = adapter
    slimgpt.prune_folder(str(folder), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    model, tokenizer = slimgpt.load(str(folder))
    slimgpt.prune(model, tokenizer, calibration=str(text_file), **OPTIONS)
    slim, _ = slimgpt.load(str(tmp_path / "slim"))
    with torch.no_grad():
        torch.testing.assert_close(slim(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "slim" / "slimgpt.json").read_text())["base_model"] == "adapter"


def test_neither_the_adapter_nor_its_base_is_replaced(adapter, dense_folder, text_file):
    folder, _ = adapter
    for out in (folder, dense_folder):
        with pytest.raises(slimgpt.SlimGPTError, match="the model that is read"):
            slimgpt.prune_folder(str(folder), out, calibration=str(text_file), overwrite=True, **OPTIONS)
    assert (dense_folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "only LoRA can be merged"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
    ],
)
def test_adapters_that_cannot_be_merged(adapter, change, message):
    folder, _ = adapter
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        slimgpt.load(str(folder))


def test_a_pickled_adapter_is_refused(adapter):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled adapters are never read"):
        slimgpt.load(str(folder))
