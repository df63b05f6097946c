"""Exports that are Hugging Face folders of a stock class, or of a format other engines read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from slimgpt.checkpoint.shards import write_shards
from slimgpt.errors import ExportError
from slimgpt.exporting.source import Exported
from slimgpt.models.heterogeneous import head_dim, stock_class
from slimgpt.models.stock import stock_config
from slimgpt.planning.engines import NEMOTRON_STEP, is_uniform, nemotron_problem


def write_stock_folder(
    exported: Exported, folder: Path, config: PreTrainedConfig, layer: Callable[[int], dict[str, Tensor]] | None = None
) -> None:
    """Write config, weights, tokenizer and generation settings for a stock class.

    Args:
        layer: the state dict of a layer; by default as it is.
    """
    config.architectures = [stock_class(config).__name__]
    config.dtype = exported.config.dtype
    config.save_pretrained(folder)
    write_weights(exported, folder, layer)
    write_rest(exported, folder)


def write_weights(exported: Exported, folder: Path, layer: Callable[[int], dict[str, Tensor]] | None = None) -> None:
    """Write the weights in shards, a layer in memory at a time."""
    start = f"{exported.architecture.layers}."
    around = {name: exported[name] for name in exported.names if not name.startswith(start)}
    take = layer or exported.layer

    def groups():
        yield around
        for index in range(len(exported.sizes)):
            yield {f"{start}{index}.{name}": tensor for name, tensor in take(index).items()}

    write_shards(folder, groups())


def write_rest(exported: Exported, folder: Path) -> None:
    """Tokenizer and generation settings."""
    exported.tokenizer().save_pretrained(folder)
    if (exported.folder / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(exported.folder).to_json_file(folder / "generation_config.json")


def check_uniform(exported: Exported) -> None:
    """Refuse what no stock class holds.

    Raises:
        ExportError: layers of different widths, or a head count that every stock class refuses.
    """
    if not is_uniform(exported.sizes):
        raise ExportError(
            f"the layers of {exported.source.name} differ in width, so no stock class holds them; use --to padded, or "
            "prune with --uniform"
        )
    if stock_config(exported.config, exported.sizes[0]) is None:
        raise ExportError(f"no stock class of transformers takes the widths {exported.sizes[0]}; use --to padded")


def write_uniform(exported: Exported, folder: Path) -> list[str]:
    """A stock class of the same widths, relabelled where the family's own refuses them; returns notes."""
    config = stock_config(exported.config, exported.sizes[0])
    assert config is not None
    write_stock_folder(exported, folder, config)
    if config.model_type != exported.config.model_type:
        return [f"saved as {config.model_type}, which computes the same function"]
    return []


def check_nemotron(exported: Exported) -> None:
    """Refuse what ``block_configs`` cannot express.

    Raises:
        ExportError: with the reason, and a form that can.
    """
    if (problem := nemotron_problem(exported.config, exported.sizes)) is not None:
        raise ExportError(f"{exported.source.name} cannot become nemotron-nas: {problem}; or use --to padded")


def write_nemotron(exported: Exported, folder: Path) -> list[str]:
    """The weights under a config with ``block_configs``, which vLLM, SGLang, TensorRT-LLM and mlx-lm read; notes."""
    config: dict[str, Any] = exported.config.to_dict()
    for field in ("per_layer_config", "allow_global_per_layer_attribute_access", "auto_map", "rope_parameters"):
        config.pop(field, None)
    rope = dict(exported.config.rope_parameters or {})
    heads, kv = (exported.sizes[0][field] for field in ("num_attention_heads", "num_key_value_heads"))
    kind = rope.pop("rope_type", "default")
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_attention_heads": heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "head_dim": head_dim(exported.config),
        "dtype": str(exported.config.dtype or "float32").removeprefix("torch."),
        "rope_theta": rope.pop("rope_theta", 10000.0),
        "rope_scaling": None if kind == "default" else {"rope_type": kind, **rope},
        "block_configs": [
            {
                "attention": {"n_heads_in_group": heads // kv, "no_op": False, "replace_with_linear": False},
                "ffn": {
                    "ffn_mult": ffn_mult(layer["intermediate_size"], exported.config.hidden_size),
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
