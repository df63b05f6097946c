"""Tiny quantised checkpoints, one for every scheme, and the models that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from slimgpt.io.tensors import write_tensors
from tests.models import quantized_folders as q
from tests.models.families import tiny_model
from tests.models.mixtures import OWN_OF_MIXTURES, tiny_mixture

WIDE = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
"""Sizes that groups of 16 and 32 columns divide."""


def dense(root: Path, family: str, tokenizer: Any = None, **changes: Any) -> Path:
    """The folder of a tiny model in bfloat16."""
    model = (tiny_mixture if family in OWN_OF_MIXTURES else tiny_model)(family, **changes).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(root / "dense")
    if tokenizer is not None:
        tokenizer.save_pretrained(root / "dense")
    return root / "dense"


class Scheme:
    """A quantised folder, and the exact values of what was quantised by the names that the dense files have."""

    def __init__(self) -> None:
        self.exact: dict[str, torch.Tensor] = {}

    def fp8(self, how: Callable[..., Any], scale: str, *extra: str) -> Callable[..., dict[str, torch.Tensor]]:
        """Numbers and scales as ``how`` makes them, ``scale`` added to the name; ``extra`` are scales of no use."""

        def quantise(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
            numbers, scales, self.exact[name] = how(tensor)
            module = name.removesuffix("weight")
            return {name: numbers, f"{name}{scale}": scales, **{module + end: torch.tensor(0.37) for end in extra}}

        return quantise

    def mxfp4(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks, scales, self.exact[name] = q.mxfp4_stack(tensor)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    def nvfp4(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, scales, scale, self.exact[name] = q.nvfp4(tensor)
        return {name: packed, f"{name}_scale": scales, f"{name}_scale_2": scale}

    def packed(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        integers, scales, self.exact[name] = q.int4_in_groups(tensor, 16)
        return {
            f"{name}_packed": q.pack(integers + 8),
            f"{name}_scale": scales,
            f"{name}_shape": torch.tensor(tensor.shape),
        }

    def awq(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        integers, scales, self.exact[name] = q.int4_in_groups(tensor, 16)
        zeros = torch.full((scales.shape[1], scales.shape[0]), 8)
        module = name.removesuffix("weight")
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            f"{module}qweight": q.pack(integers.T + 8, order),
            f"{module}qzeros": q.pack(zeros, order),
            f"{module}scales": scales.T.contiguous(),
        }


def compressed(**weights: Any) -> dict[str, Any]:
    form = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax", **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if form["num_bits"] == 4 else "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": form, "input_activations": None}},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
MODELOPT = {"producer": {"name": "modelopt", "version": "0.27.0"}}

# Name: family, changes of its config, quantization_config, quantiser, transformers' config that de-quantises it.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, Callable[[Scheme], Any], Any]] = {
    "fp8-blocks": (
        "qwen3", {}, {**FP8, "weight_block_size": [2, 4]},
        lambda s: s.fp8(lambda m: q.fp8_in_blocks(m, (2, 4)), "_scale_inv"), FineGrainedFP8Config,
    ),
    "fp8-blocks-of-experts": (
        "qwen3_moe", {}, {**FP8, "weight_block_size": [2, 4]},
        lambda s: s.fp8(lambda m: q.fp8_in_blocks(m, (2, 4)), "_scale_inv"), FineGrainedFP8Config,
    ),
    "fp8-blocks-deepseek": (
        "deepseek_v3", {}, {**FP8, "weight_block_size": [2, 2]},
        lambda s: s.fp8(lambda m: q.fp8_in_blocks(m, (2, 2)), "_scale_inv"), FineGrainedFP8Config,
    ),
    "fp8-blocks-cut-short": (  # transformers takes blocks of equal size, or refuses these
        "llama", {}, {**FP8, "weight_block_size": [16, 20]},
        lambda s: s.fp8(lambda m: q.fp8_in_blocks(m, (16, 20)), "_scale_inv"), None,
    ),
    "fp8-per-tensor-static": (
        "mistral", {}, {**FP8, "activation_scheme": "static", "weight_block_size": None, "dequantize": False},
        lambda s: s.fp8(q.fp8_per_tensor, "_scale_inv", "activation_scale"), FineGrainedFP8Config,
    ),
    "mxfp4": (
        "gpt_oss", {**WIDE, "intermediate_size": 32},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        lambda s: s.mxfp4, Mxfp4Config,
    ),
    "compressed-tensor": (
        "llama", {}, compressed(strategy="tensor"),
        lambda s: s.fp8(q.fp8_per_tensor, "_scale", "input_scale"), CompressedTensorsConfig,
    ),
    "compressed-channel": (
        "llama", {}, compressed(strategy="channel"), lambda s: s.fp8(q.fp8_per_row, "_scale"), CompressedTensorsConfig,
    ),
    "compressed-without-biases": (
        "qwen2", {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "vocab_size": 100},
        compressed(strategy="channel"), lambda s: s.fp8(q.fp8_per_row, "_scale"), CompressedTensorsConfig,
    ),
    "compressed-channel-of-experts": (
        "qwen3_moe", {}, compressed(strategy="channel"), lambda s: s.fp8(q.fp8_per_row, "_scale"),
        CompressedTensorsConfig,
    ),
    "compressed-block": (
        "llama", {}, compressed(strategy="block", block_structure=[16, 20]),
        lambda s: s.fp8(lambda m: q.fp8_in_blocks(m, (16, 20)), "_scale"), None,
    ),
    "compressed-packed": (
        "qwen3", WIDE, compressed(num_bits=4, type="int", strategy="group", group_size=16), lambda s: s.packed,
        CompressedTensorsConfig,
    ),
    "compressed-packed-experts": (
        "qwen3_moe", {**WIDE, "moe_intermediate_size": 32},
        compressed(num_bits=4, type="int", strategy="group", group_size=16), lambda s: s.packed, None,
    ),
    "fbgemm": ("llama", {}, {"quant_method": "fbgemm_fp8"}, lambda s: s.fp8(q.fp8_per_row, "_scale"), None),
    "modelopt-fp8": (
        "llama", {}, None, lambda s: s.fp8(q.fp8_per_tensor, "_scale", "input_scale", "k_scale", "v_scale"), None,
    ),
    "modelopt-nvfp4": ("qwen3", WIDE, None, lambda s: s.nvfp4, None),
    "awq": (
        "qwen3", WIDE, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
        lambda s: s.awq, None,
    ),
}  # fmt: skip
WITH_LIBRARY = ("compressed-packed", "compressed-packed-experts", "awq")


def make(case: str, root: Path, tokenizer: Any = None) -> tuple[Path, Scheme]:
    """The quantised folder of a case, ``root / "dense"`` beside it."""
    family, changes, quantization, quantiser, _ = CASES[case]
    scheme = Scheme()
    chosen = {"mxfp4": lambda name: name.endswith(("experts.gate_up_proj", "experts.down_proj"))}.get(case)
    source = dense(root, family, tokenizer, **changes)
    folder = q.rewrite(source, root / case, quantiser(scheme), quantization, **({"chosen": chosen} if chosen else {}))
    if case.startswith("modelopt"):
        algorithm = "NVFP4" if case.endswith("nvfp4") else "FP8"
        content = {**MODELOPT, "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"]}}
        (folder / "hf_quant_config.json").write_text(json.dumps(content))
    return folder, scheme


def exact_model(root: Path, scheme: Scheme, cls: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The dense model with the exact values of what was quantised, rounded once to bfloat16."""
    state = load_file(root / "dense/model.safetensors")
    target = root / "exact"
    target.mkdir()
    (target / "config.json").write_text((root / "dense/config.json").read_text())
    assert scheme.exact.keys() <= state.keys()
    state |= {name: value.float().to(torch.bfloat16).contiguous() for name, value in scheme.exact.items()}
    # Aligned, as what is de-quantised is: the address of a factor can move the last bit of a product.
    write_tensors(state, target / "model.safetensors")
    return cls.from_pretrained(target)
