"""Files and models whose tensors begin at multiples of 64 bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import slimgpt
from slimgpt.io.tensors import ALIGNMENT, TYPE_CODES, align, write_tensors
from tests.models.families import tiny_model, windows


@given(
    sizes=st.lists(st.tuples(st.sampled_from(list(TYPE_CODES)), st.lists(st.integers(0, 9), max_size=3)), max_size=8),
    names=st.lists(st.text(min_size=1, max_size=40), min_size=8, max_size=8, unique=True),
)
@settings(max_examples=80, deadline=None)
def test_the_library_reads_back_what_was_written(sizes, names, tmp_path_factory):
    tensors = {
        name: torch.arange(torch.Size(shape).numel()).to(dtype).view(shape)
        for name, (dtype, shape) in zip(names, sizes)
        if name != "__metadata__"
    }
    file = tmp_path_factory.mktemp("file") / "model.safetensors"
    write_tensors(tensors, file)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    first = [tensor for tensor in loaded.values() if tensor.nbytes and tensor.nbytes % ALIGNMENT == 0]
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in first)


def test_transposed_and_sliced_tensors_are_written_as_they_read(tmp_path):
    whole = torch.randn(6, 8)
    tensors = {"transposed": whole.T, "columns": whole[:, 2:5], "rows": whole[1:3]}
    write_tensors(tensors, tmp_path / "file")
    loaded = load_file(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_matrices_of_a_saved_model_begin_at_multiples_of_64(family, tmp_path):
    model = tiny_model(family)
    report = slimgpt.prune(model, None, 0.2, windows(), device="cpu")
    slimgpt.save(model, None, report, tmp_path / "slim")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", trust_remote_code=True)
    matrices = [parameter for parameter in loaded.parameters() if parameter.ndim > 1]
    assert len(matrices) >= 16
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in matrices)


def test_a_model_from_an_unaligned_file_is_aligned_once_pruned(tmp_path):
    """Products of a shifted factor may differ in the last bit; the reloaded folder would then disagree."""
    model = tiny_model("llama")
    tensors = {"first": torch.zeros(1), **model.state_dict()}
    tensors.pop("lm_head.weight")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "shifted.safetensors")
    shifted = load_file(tmp_path / "shifted.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data = shifted[name]
    assert any(parameter.data_ptr() % ALIGNMENT for parameter in model.parameters())
    slimgpt.prune(model, None, 0.3, windows(), device="cpu")
    assert all(parameter.data_ptr() % ALIGNMENT == 0 for parameter in model.parameters())


def test_aligning_changes_no_number_and_keeps_ties():
    model = tiny_model("llama")
    buffer = torch.empty(model.model.embed_tokens.weight.numel() + 1)
    shifted = buffer[1:].view_as(model.model.embed_tokens.weight).copy_(model.model.embed_tokens.weight)
    model.model.embed_tokens.weight.data = shifted
    align(model)
    assert torch.equal(model.model.embed_tokens.weight, shifted)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.data_ptr() % ALIGNMENT == 0
    ids = windows(1, 4)
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        assert torch.equal(model(ids).logits, F.linear(hidden, model.lm_head.weight))
