"""Exports of a model with a layer without attention, against the slim folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimgpt
from slimgpt.errors import ExportError
from slimgpt.exporting.decoder_graph import DecoderGraph
from slimgpt.models.llama_cpp import installed
from slimgpt.models.lookup import layer_sizes
from slimgpt.planning.engines import engine_support
from tests.export.test_engines import WIDE, agrees
from tests.models.families import tiny_model, windows

IDS = windows(2, 32)

ALL_HEADS = """head_unit = "kv"
layers = [
  {num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 512},
  {num_attention_heads = 0, num_key_value_heads = 0, intermediate_size = 768},
  {num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 256},
]
"""
NARROW = ALL_HEADS.replace("num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 256",
                           "num_attention_heads = 2, num_key_value_heads = 1, intermediate_size = 250")  # fmt: skip


def make(folder: Path, plan: str, tokenizer, family="llama", **changes) -> Path:
    model = tiny_model(family, **{**WIDE, **changes})
    with torch.no_grad():  # so that layers matter beside the embedding
        for parameter in model.model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    (folder / "plan.toml").write_text(plan)
    report = slimgpt.prune(model, None, plan=str(folder / "plan.toml"), calibration=windows(), device="cpu")
    slimgpt.save(model, tokenizer, report, folder / "slim")
    return folder / "slim"


@pytest.fixture(scope="module")
def skipped(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Slim folders with a layer without attention: all heads elsewhere, and fewer in one layer."""
    plans = {"all-heads": ALL_HEADS, "narrow": NARROW}
    return {name: make(tmp_path_factory.mktemp(name), plan, tokenizer) for name, plan in plans.items()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", ["all-heads", "narrow"])
def test_padded_has_an_attention_of_zeros(name, skipped, tmp_path):
    report = slimgpt.export(skipped[name], tmp_path / "padded", "padded")
    assert report.verification.continuations == (5, 5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    torch.testing.assert_close(logits(stock), logits(slimgpt.load(str(skipped[name]))[0]), rtol=1e-5, atol=1e-5)
    assert not stock.model.layers[1].self_attn.o_proj.weight.any()


def test_sandwich_norms_of_zeros(tmp_path, tokenizer):
    layers = ALL_HEADS.replace("layers = [", "layers = [" + ALL_HEADS.splitlines()[2])  # the first of both kinds stay
    kinds = ["sliding_attention", "full_attention"] * 2
    changes = {"num_hidden_layers": 4, "layer_types": kinds, "rope_parameters": None}
    folder = make(tmp_path, layers, tokenizer, "gemma3_text", **changes)
    report = slimgpt.export(folder, tmp_path / "padded", "padded")
    assert report.verification.continuations == (5, 5)


def test_gguf_has_no_attention_and_no_heads_there(skipped, tmp_path):
    slimgpt.export(skipped["narrow"], tmp_path / "slim.gguf", "gguf", quantize="F32", check=False)
    reader = GGUFReader(tmp_path / "slim.gguf")
    assert reader.fields["general.architecture"].contents() == "deci"
    assert reader.fields["deci.attention.head_count"].contents() == [4, 0, 2]
    assert reader.fields["deci.attention.head_count_kv"].contents() == [2, 0, 1]
    names = {tensor.name for tensor in reader.tensors}
    assert {name for name in names if name.startswith("blk.1.")} == {
        f"blk.1.{part}.weight" for part in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    }


@pytest.mark.skipif(not installed(), reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("name", ["all-heads", "narrow"])
def test_llama_cpp_computes_what_transformers_does(name, skipped, tmp_path):
    report = slimgpt.export(skipped[name], tmp_path / "slim.gguf", "gguf", quantize="F32")
    assert abs(report.verification.difference) < 5e-4
    assert report.verification.continuations == (5, 5)


def test_norms_of_queries_and_keys_have_no_such_gguf(tmp_path, tokenizer):
    folder = make(tmp_path, ALL_HEADS, tokenizer, "qwen3")
    with pytest.raises(ExportError, match="attention in every layer"):
        slimgpt.export(folder, tmp_path / "slim.gguf", "gguf")


def test_nemotron_says_no_op(skipped, tmp_path):
    slimgpt.export(skipped["all-heads"], tmp_path / "nemotron", "nemotron-nas")
    config = json.loads((tmp_path / "nemotron/config.json").read_text())
    blocks = [block["attention"] for block in config["block_configs"]]
    assert [block["no_op"] for block in blocks] == [False, True, False]
    assert [block["n_heads_in_group"] for block in blocks] == [2, None, 2]
    weights = load_file(tmp_path / "nemotron/model.safetensors")
    assert not [name for name in weights if ".1.self_attn" in name or ".1.input_layernorm" in name]
    with pytest.raises(ExportError, match="all heads of the dense model"):
        slimgpt.export(skipped["narrow"], tmp_path / "other", "nemotron-nas")


def test_a_graph_has_no_cache_there(skipped):
    model = slimgpt.load(str(skipped["narrow"]))[0]
    graph = DecoderGraph(model)
    assert graph.past_names == [f"past_key_values.{index}.{part}" for index in (0, 2) for part in ("key", "value")]
    ids = windows(2, 12)
    seen, positions = torch.ones_like(ids), torch.arange(12).expand(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        empty = [torch.zeros(2, heads, 0, size) for heads, size in graph.cache_sizes]
        first, *cache = graph(ids[:, :7], seen[:, :7], positions[:, :7], *empty)
        second = graph(ids[:, 7:], seen, positions[:, 7:], *cache)[0]
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=1e-4, atol=1e-4)


def test_a_plan_says_who_runs_it(skipped):
    verdicts = {}
    for name, folder in skipped.items():
        model = slimgpt.load(str(folder))[0]
        verdicts[name] = {each.engine: each for each in engine_support(model.config, layer_sizes(model.config))}
    runs = {name: {engine for engine, each in rows.items() if each.runs} for name, rows in verdicts.items()}
    assert runs == {
        "all-heads": {"hf", "vllm", "llama.cpp", "sglang", "mlx", "onnx"},
        "narrow": {"hf", "llama.cpp", "onnx"},
    }
    assert "attention in every layer" in verdicts["narrow"]["vllm"].how


@pytest.mark.vllm
def test_vllm(skipped, tmp_path):
    folders = {"slim": skipped["all-heads"], "nemotron": tmp_path / "nemotron"}
    slimgpt.export(folders["slim"], folders["nemotron"], "nemotron-nas")
    agrees(folders, "nemotron", "slim", "vllm")


@pytest.mark.vllm
def test_vllm_does_not_build_the_folder_itself(skipped):
    with pytest.raises(ExportError, match="does not dispatch through the Transformers attention interface"):
        agrees(skipped, "narrow", "narrow", "vllm")


@pytest.mark.mlx
def test_mlx(skipped, tmp_path):
    folders = {"slim": skipped["all-heads"], "nemotron": tmp_path / "nemotron"}
    slimgpt.export(folders["slim"], folders["nemotron"], "nemotron-nas")
    agrees(folders, "nemotron", "slim", "mlx")
