"""Baichuan's and InternLM2's layouts as Llama, against their own forward passes."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import slimgpt
from slimgpt.checkpoint.convert import convert
from slimgpt.errors import ModelError, OutputError, SlimGPTError
from slimgpt.io.weight_files import weight_files
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import windows
from tests.models.remote_code import remote_folder

IDS = windows(2, 24, seed=5)
SIZES = {"hidden_size": 48, "intermediate_size": 52, "num_attention_heads": 6, "num_hidden_layers": 3}


def change_config(folder, **changes):
    file = folder / "config.json"
    values = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")


@pytest.fixture
def baichuan(tmp_path, tokenizer):
    """A small model of Baichuan's layout and its folder, which calls itself as Baichuan does."""
    model = remote_folder(tmp_path / "baichuan", tokenizer)
    change_config(tmp_path / "baichuan", model_type="baichuan")
    return model, tmp_path / "baichuan"


def test_baichuan_becomes_a_llama_with_the_same_logits(baichuan, tmp_path, text_file):
    model, folder = baichuan
    result = convert(str(folder), tmp_path / "llama")
    assert (result.model_type, result.parameters) == ("baichuan", sum(p.numel() for p in model.parameters()))
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert isinstance(llama, LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(llama(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "llama").glob("*.py"))
    options = {"num_samples": 8, "seq_len": 24, "device": "cpu", "calibration": str(text_file)}
    report = slimgpt.prune_folder(str(tmp_path / "llama"), tmp_path / "slim", 0.3, **options)
    assert report.model_type == "llama"


def test_the_head_of_baichuan_2_is_normalised(baichuan, tmp_path):
    """Its own code normalises the head's rows on every call."""
    model, folder = baichuan
    (folder / "modeling_tiny_baichuan.py").write_text("class NormHead: ...", encoding="utf-8")
    result = convert(str(folder), tmp_path / "llama")
    assert any("normalised" in note for note in result.notes)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        expected = F.linear(hidden, F.normalize(model.lm_head.weight))
        torch.testing.assert_close(llama(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def internlm2(tmp_path):
    """Random tensors of InternLM2's names, their folder, and what its attention computes, from the definition."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / math.sqrt(shape[-1])

    tensors = {"model.tok_embeddings.weight": draw(300, 48), "output.weight": draw(300, 48)}
    tensors["model.norm.weight"] = 1 + 0.1 * draw(48)
    for layer in range(3):
        at = f"model.layers.{layer}."
        tensors |= {
            f"{at}attention.wqkv.weight": draw((6 + 2 * 2) * 8, 48),
            f"{at}attention.wo.weight": draw(48, 48),
            f"{at}feed_forward.w1.weight": draw(52, 48),
            f"{at}feed_forward.w3.weight": draw(52, 48),
            f"{at}feed_forward.w2.weight": draw(48, 52),
            f"{at}attention_norm.weight": 1 + 0.1 * draw(48),
            f"{at}ffn_norm.weight": 1 + 0.1 * draw(48),
        }
    folder = tmp_path / "internlm2"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        **SIZES, "model_type": "internlm2", "num_key_value_heads": 2, "vocab_size": 300, "bias": False,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 128, "hidden_act": "silu", "auto_map": {"AutoModelForCausalLM": "x.Y"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors, folder


def internlm2_logits(tensors, ids):
    """The forward pass from the definition: KV head by KV head, its three query heads, its key, its value."""

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    def rotate(x):
        positions = torch.arange(x.shape[-2])[:, None] * 10000.0 ** (-torch.arange(4) / 4)
        first, second = x[..., :4], x[..., 4:]
        cos, sin = positions.cos(), positions.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    x = tensors["model.tok_embeddings.weight"][ids]
    for layer in range(3):
        own = {name.removeprefix(f"model.layers.{layer}."): t for name, t in tensors.items()}
        stacked = norm(x, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T
        heads = []
        for head in range(2):
            block = stacked[..., head * 40 : (head + 1) * 40]
            key, value = rotate(block[..., 24:32]), block[..., 32:40]
            for query in range(3):
                q = rotate(block[..., query * 8 : (query + 1) * 8])
                scores = q @ key.mT / math.sqrt(8)
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
                heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, -1) @ own["attention.wo.weight"].T
        y = norm(x, own["ffn_norm.weight"])
        gated = F.silu(y @ own["feed_forward.w1.weight"].T) * (y @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
    return norm(x, tensors["model.norm.weight"]) @ tensors["output.weight"].T


@pytest.mark.parametrize("limit", [10**9, 30_000])
def test_internlm2_becomes_a_llama_with_the_same_logits(internlm2, tmp_path, limit):
    tensors, folder = internlm2
    with other_thresholds(shard_bytes=limit):
        convert(str(folder), tmp_path / "llama")
    assert (len(weight_files(tmp_path / "llama")) > 1) == (limit < 10**9)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert llama.config.rope_parameters["rope_type"] == "dynamic"
    with torch.no_grad():
        torch.testing.assert_close(llama(IDS).logits, internlm2_logits(tensors, IDS), rtol=1e-4, atol=1e-5)


def test_biases_of_internlm2_are_cut_as_its_rows(internlm2, tmp_path):
    tensors, folder = internlm2
    for layer in range(3):
        tensors[f"model.layers.{layer}.attention.wqkv.bias"] = torch.arange(80.0)
        tensors[f"model.layers.{layer}.attention.wo.bias"] = torch.arange(48.0)
    save_file(tensors, folder / "model.safetensors")
    change_config(folder, bias=True)
    convert(str(folder), tmp_path / "llama")
    written = load_file(tmp_path / "llama" / "model.safetensors")
    at = "model.layers.1.self_attn."
    assert written[f"{at}q_proj.bias"].tolist() == [*range(24), *range(40, 64)]
    assert written[f"{at}k_proj.bias"].tolist() == [*range(24, 32), *range(64, 72)]
    assert written[f"{at}v_proj.bias"].tolist() == [*range(32, 40), *range(72, 80)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_position_embeddings": None, "model_max_length": 4096}, "ALiBi"),
        ({"hidden_size": 5120}, "ALiBi"),
        ({"model_type": "llama"}, "none of the layouts"),
        ({"intermediate_size": 60}, "by the config"),
        ({"num_hidden_layers": 4}, "lack"),
        ({"num_hidden_layers": 2}, "no place"),
    ],
)
def test_what_is_no_llama_is_refused_before_anything_is_written(baichuan, tmp_path, changes, reason):
    _, folder = baichuan
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=reason):
        convert(str(folder), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize(
    ("layout", "changes", "reason"),
    [
        ("baichuan", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "which Baichuan's own code does not read"),
        ("baichuan", {"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ("internlm2", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scaled by 'yarn'"),
        ("internlm2", {"num_key_value_heads": 4}, r"cannot be cut|must be|rows|divisible"),
        ("internlm2", {"num_key_value_heads": 100}, r"cannot be cut|must be|rows|divisible"),
        ("internlm2", {"hidden_act": "none"}, "none that can be built"),
    ],
)
def test_a_config_that_says_something_else_than_the_files_is_refused(layout, changes, reason, request, tmp_path):
    _, folder = request.getfixturevalue(layout)
    change_config(folder, **changes)
    with pytest.raises(SlimGPTError, match=reason):
        convert(str(folder), tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_a_head_of_its_own_is_kept_where_the_config_ties_it(baichuan, tmp_path):
    model, folder = baichuan
    change_config(folder, tie_word_embeddings=True)
    assert convert(str(folder), tmp_path / "llama").parameters == sum(p.numel() for p in model.parameters())
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(llama.lm_head.weight, model.lm_head.weight)
    assert llama.config.tie_word_embeddings is False


def test_code_that_is_no_file_is_not_read(baichuan, tmp_path):
    _, folder = baichuan
    os.mkfifo(folder / "modeling_pipe.py")
    with pytest.raises(ModelError, match=r"modeling_pipe\.py is no regular file"):
        convert(str(folder), tmp_path / "llama")


def test_alibi_is_seen_in_the_code_which_is_read_and_not_run(baichuan, tmp_path):
    _, folder = baichuan
    (folder / "modeling_baichuan.py").write_text("raise SystemExit('run')\ndef gen_alibi_mask(): ...", "utf-8")
    with pytest.raises(ModelError, match="ALiBi"):
        convert(str(folder), tmp_path / "llama")


def test_pickled_files_are_never_read(baichuan, tmp_path):
    model, folder = baichuan
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"safetensors"):
        convert(str(folder), tmp_path / "llama")


def test_an_existing_folder_is_not_overwritten_unasked(internlm2, tmp_path):
    _, folder = internlm2
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300)).save_pretrained(tmp_path / "llama")
    with pytest.raises(OutputError):
        convert(str(folder), tmp_path / "llama")
    assert convert(str(folder), tmp_path / "llama", overwrite=True).layout.startswith("wqkv")
