"""Slim folders quantised on the way in (docs/guides/quantise.md). Skipped without torchao or bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import slimgpt
from tests.models.families import tiny_model, windows

IDS = windows(2, 16)
WIDE = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "intermediate_size": 256, "attention_bias": False, "mlp_bias": False}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """The same tiny Llama pruned to FFN widths of any number, and to multiples of 64."""
    made = {}
    for step in (1, 64):
        model = tiny_model("llama", **WIDE)
        report = slimgpt.prune(model, None, 0.3, windows(), round_to=step, device="cpu")
        made[step] = slimgpt.save(model, None, report, tmp_path_factory.mktemp("slim") / str(step))
    return made


def config_of(kind: str) -> Any:
    library = pytest.importorskip("torchao" if kind.startswith("int8") else "bitsandbytes")
    if library.__name__ == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Int8DynamicActivationInt8WeightConfig())
    if kind == "bnb8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, device_map="cpu", **options
    )
    return model(IDS).logits.float()


@pytest.mark.parametrize(
    ("kind", "step", "limit"), [("int8", 1, 0.03), ("int8-both", 1, 0.06), ("bnb8", 1, 0.06), ("nf4", 64, 0.4)]
)
def test_a_quantised_slim_model_is_near_the_slim_model(kind, step, limit, folders):
    options = {"quantization_config": config_of(kind)}
    exact = logits(folders[step])
    quantised = logits(folders[step], **options)
    difference = float((quantised - exact).norm() / exact.norm())
    print(f"{kind}: {difference:.4f}")
    assert 0 < difference < limit
