"""A nemotron-nas folder: widths as ``block_configs``."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.config_file import legacy_fields
from slimgpt.errors import ExportError
from slimgpt.exporting import configuration_decilm
from slimgpt.exporting.configuration_decilm import DeciLMConfig
from slimgpt.exporting.hf_folder import write_rest, write_weights
from slimgpt.exporting.source import ExportSource
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.config_files import CONFIG_FILE
from slimgpt.models.lookup import head_dim
from slimgpt.planning.engines import NEMOTRON_STEP, nemotron_problem
from slimgpt.planning.stock_forms import padded_problem
from slimgpt.runtime.devices import dtype_name

CONFIGURATION_FILE = "configuration_decilm.py"
"""The file in a nemotron-nas folder that holds the class of its config."""


def check_nemotron(exported: ExportSource) -> None:
    """Refuse what ``block_configs`` cannot express.

    Raises:
        ExportError: with the reason, and a form that can.
    """
    if (problem := nemotron_problem(exported.config, exported.sizes)) is not None:
        padded = "" if padded_problem(exported.config, exported.sizes) else "; or use --to padded"
        raise ExportError(f"{exported.source.name} cannot become nemotron-nas: {problem}{padded}")


def write_nemotron(exported: ExportSource, folder: Path) -> list[str]:
    """The weights under a config with ``block_configs``, which vLLM, SGLang, TensorRT-LLM and mlx-lm read; notes.

    Engines read configs through transformers, which has no class for them: one travels in the folder.
    """
    config: dict[str, Any] = exported.config.to_dict()
    for field in ("per_layer_config", "allow_global_per_layer_attribute_access"):
        config.pop(field, None)
    heads, kv = (exported.sizes[0][field] for field in (HEADS, KV_HEADS))
    config |= {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.{DeciLMConfig.__name__}"},
        "model_type": DeciLMConfig.model_type,
        HEADS: heads,
        KV_HEADS: None,
        CHANNELS: None,
        "head_dim": head_dim(exported.config),
        "dtype": dtype_name(exported.config.dtype or "float32"),
        "block_configs": [
            {
                "attention": {
                    "n_heads_in_group": heads // kv if layer[HEADS] else None,
                    "no_op": not layer[HEADS],
                    "replace_with_linear": False,
                },
                "ffn": {
                    "ffn_mult": ffn_mult(layer[CHANNELS], exported.config.hidden_size),
                    "no_op": False,
                    "replace_with_linear": False,
                },
            }
            for layer in exported.sizes
        ],
    }
    config |= legacy_fields(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIGURATION_FILE).write_text(inspect.getsource(configuration_decilm), encoding="utf-8")
    write_weights(exported, folder)
    write_rest(exported, folder)
    return []


def ffn_mult(width: int, hidden_size: int) -> float:
    """The multiplier from which engines compute ``width``: ``int(2 m hidden / 3)`` up to a multiple of 256."""
    multiplier = 3 * width / (2 * hidden_size)
    assert -(-int(2 * multiplier * hidden_size / 3) // NEMOTRON_STEP) * NEMOTRON_STEP == width
    return multiplier
