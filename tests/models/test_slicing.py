"""Slicing against indices written out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimgpt.models import ARCHITECTURES
from slimgpt.models.architecture import Fused, Structure
from slimgpt.models.slicing import slice_state, unit_rows


@given(units=st.integers(1, 9), d=st.integers(1, 5), data=st.data())
def test_unit_rows(units, d, data):
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1), min_size=1)))
    rows = unit_rows(units * d, units, torch.tensor(kept))
    assert rows.tolist() == [row for row in range(units * d) if row // d in kept]


def test_an_axis_that_does_not_split():
    with pytest.raises(ValueError, match="does not split"):
        unit_rows(10, 3, torch.tensor([0]))


def test_fused_parts_of_unequal_length():
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 5}
    d, hidden = 4, 7
    qkv = torch.arange((6 + 3 + 3) * d * hidden).view(-1, hidden).float()
    gate_up = torch.arange(10 * hidden).view(-1, hidden).float()
    state = {
        "self_attn.qkv_proj.weight": qkv,
        "self_attn.o_proj.weight": torch.zeros(hidden, 24),
        "mlp.gate_up_proj.weight": gate_up,
        "mlp.down_proj.weight": torch.zeros(hidden, 5),
        "input_layernorm.weight": torch.ones(hidden),
    }
    q, k, v = qkv[:24], qkv[24:36], qkv[36:]
    phi3 = ARCHITECTURES["phi3"]

    sliced = slice_state(state, phi3.find("kv"), sizes, torch.tensor([0, 2]), torch.ones(hidden, 16))
    expected = torch.cat([q[:8], q[16:24], k[:4], k[8:12], v[:4], v[8:12]])
    assert torch.equal(sliced["self_attn.qkv_proj.weight"], expected)
    assert torch.equal(sliced["self_attn.o_proj.weight"], torch.ones(hidden, 16))
    assert sliced["input_layernorm.weight"] is state["input_layernorm.weight"]

    sliced = slice_state(state, phi3.find("query"), sizes, torch.tensor([1, 2, 5]), torch.ones(hidden, 12))
    expected = torch.cat([q[4:12], q[20:24], k, v])
    assert torch.equal(sliced["self_attn.qkv_proj.weight"], expected)

    sliced = slice_state(state, phi3.find("ffn"), sizes, torch.tensor([1, 4]), torch.ones(hidden, 2))
    assert torch.equal(sliced["mlp.gate_up_proj.weight"], gate_up[[1, 4, 6, 9]])
    assert torch.equal(state["mlp.gate_up_proj.weight"], gate_up)


def test_biases_go_with_their_rows():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 3}
    state = {f"self_attn.{p}_proj.weight": torch.randn(8 if p == "q" else 4, 5) for p in "qkv"}
    state |= {f"self_attn.{p}_proj.bias": torch.randn(8 if p == "q" else 4) for p in "qkv"}
    state["self_attn.o_proj.weight"], state["self_attn.o_proj.bias"] = torch.randn(5, 8), torch.randn(5)
    sliced = slice_state(state, ARCHITECTURES["llama"].find("kv"), sizes, torch.tensor([1]), torch.zeros(5, 4))
    assert torch.equal(sliced["self_attn.q_proj.bias"], state["self_attn.q_proj.bias"][4:])
    assert torch.equal(sliced["self_attn.k_proj.bias"], state["self_attn.k_proj.bias"][2:])
    assert torch.equal(sliced["self_attn.o_proj.bias"], state["self_attn.o_proj.bias"])


def test_blocks_that_each_stack_the_parts():
    """Falcon's rows: for every KV head its query heads, its key, its value."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 5}
    parts = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")
    rows = torch.tensor([10, 11, 12, 18, 19, 23, 24, 25, 28, 29]).repeat_interleave(2).view(-1, 1)  # d = 2
    state = {"qkv.weight": rows, "o.weight": torch.zeros(1, 12)}
    for sliced, unit, kept, left in (
        ((0,), ("num_attention_heads",), [1, 2, 3, 5], [11, 12, 18, 19, 23, 25, 28, 29]),
        ((0, 1, 2), ("num_key_value_heads", "num_attention_heads"), [1], [23, 24, 25, 28, 29]),
    ):
        structure = Structure("kv", "o", (Fused("qkv", parts, sliced, "num_key_value_heads"),), unit)
        left_state = slice_state(state, structure, sizes, torch.tensor(kept), torch.zeros(1, 2))
        assert left_state["qkv.weight"].flatten().tolist() == [row for row in left for _ in range(2)]


def test_transposed_weights():
    """GPT-2's Conv1D: outputs are columns."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 5}
    parts = ("num_attention_heads",) * 3
    state = {"c_attn.weight": torch.arange(9).repeat(4, 1), "c_attn.bias": torch.arange(9)}
    unit = ("num_key_value_heads", "num_attention_heads")
    structure = Structure("kv", "c_proj", (Fused("c_attn", parts, (0, 1, 2)),), unit, transposed=True)
    sliced = slice_state(state, structure, sizes, torch.tensor([0, 2]), torch.tensor([[1, 2]]))
    assert sliced["c_attn.weight"].tolist() == [[0, 2, 3, 5, 6, 8]] * 4
    assert sliced["c_attn.bias"].tolist() == [0, 2, 3, 5, 6, 8]
    assert sliced["c_proj.weight"].tolist() == [[1], [2]]
