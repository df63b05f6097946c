"""A nemotron-nas folder: widths as ``block_configs``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slimgpt.errors import ExportError
from slimgpt.exporting.hf_folder import write_rest, write_weights
from slimgpt.exporting.source import ExportSource
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.lookup import head_dim
from slimgpt.planning.engines import NEMOTRON_STEP, nemotron_problem


def check_nemotron(exported: ExportSource) -> None:
    """Refuse what ``block_configs`` cannot express.

    Raises:
        ExportError: with the reason, and a form that can.
    """
    if (problem := nemotron_problem(exported.config, exported.sizes)) is not None:
        raise ExportError(f"{exported.source.name} cannot become nemotron-nas: {problem}; or use --to padded")


def write_nemotron(exported: ExportSource, folder: Path) -> list[str]:
    """The weights under a config with ``block_configs``, which vLLM, SGLang, TensorRT-LLM and mlx-lm read; notes."""
    config: dict[str, Any] = exported.config.to_dict()
    for field in ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map", "rope_parameters"):
        config.pop(field, None)
    rope = dict(exported.config.rope_parameters or {})
    heads, kv = (exported.sizes[0][field] for field in (HEADS, KV_HEADS))
    kind = rope.pop("rope_type", "default")
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        HEADS: heads,
        KV_HEADS: None,
        CHANNELS: None,
        "head_dim": head_dim(exported.config),
        "dtype": str(exported.config.dtype or "float32").removeprefix("torch."),
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope},
        "block_configs": [
            {
                "attention": {"n_heads_in_group": heads // kv, "no_op": False, "replace_with_linear": False},
                "ffn": {
                    "ffn_mult": ffn_mult(layer[CHANNELS], exported.config.hidden_size),
                    "no_op": False,
                    "replace_with_linear": False,
                },
            }
            for layer in exported.sizes
        ],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_weights(exported, folder)
    write_rest(exported, folder)
    return []


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier from which engines compute ``width``: ``int(2 m hidden / 3)`` up to a multiple of 256."""
    multiplier = 3 * width / (2 * hidden_size)
    assert -(-int(2 * multiplier * hidden_size / 3) // NEMOTRON_STEP) * NEMOTRON_STEP == width
    return multiplier
