"""Exports that are Hugging Face folders of a stock class, or of a format other engines read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig

from slimgpt.checkpoint.config_file import write_config
from slimgpt.checkpoint.side_files import copy_side_files
from slimgpt.errors import ExportError
from slimgpt.exporting.source import ExportSource
from slimgpt.io.shards import write_shards
from slimgpt.models.architecture import is_uniform
from slimgpt.models.build import stock_class
from slimgpt.models.config_files import GENERATION_FILE, read_generation_config
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.stock_forms import stock_forms
from slimgpt.runtime.thresholds import thresholds


def write_stock_folder(
    exported: ExportSource,
    folder: Path,
    config: PreTrainedConfig,
    layer: Callable[[int], dict[str, Tensor]] | None = None,
) -> None:
    """Write config, weights, tokenizer and generation settings for a stock class.

    Args:
        layer: the state dict of a layer; by default as it is.
    """
    config.architectures = [stock_class(config).__name__]
    config.dtype = exported.config.dtype
    write_config(config, folder)
    write_weights(exported, folder, layer)
    write_rest(exported, folder)


def write_weights(
    exported: ExportSource, folder: Path, layer: Callable[[int], dict[str, Tensor]] | None = None
) -> None:
    """Write the weights in shards, a layer in memory at a time."""
    start = f"{exported.architecture.layers}."
    around = {name: exported[name] for name in exported.names if not name.startswith(start)}
    load_layer = layer or exported.layer

    def groups():
        layers = len(exported.sizes)
        yield around
        for index in range(layers):
            exported.written(index + 1, layers + 1)
            yield {f"{start}{index}.{name}": tensor for name, tensor in load_layer(index).items()}

    write_shards(folder, groups(), thresholds().shard_bytes)
    exported.written(len(exported.sizes) + 1, len(exported.sizes) + 1)


def write_rest(exported: ExportSource, folder: Path) -> None:
    """Tokenizer, generation settings and side files."""
    exported.tokenizer().save_pretrained(folder)
    read_generation_config(exported.folder).to_json_file(folder / GENERATION_FILE)
    copy_side_files(exported.folder, folder)


def check_uniform(exported: ExportSource) -> None:
    """Refuse what no stock class holds.

    Raises:
        ExportError: layers of different widths, or a head count that every stock class refuses.
    """
    if not is_uniform(exported.sizes):
        ways = stock_forms(exported.config, exported.sizes, "prune with --uniform", "use --to padded")
        raise ExportError(
            f"the layers of {exported.source.name} differ in width, so no stock class holds them"
            f"{'; ' if ways else ''}{ways}"
        )
    if stock_config(exported.config, exported.sizes[0]) is None:
        raise ExportError(
            f"no stock class of transformers takes the widths {exported.sizes[0]}; load it with its own modeling file"
        )


def write_uniform(exported: ExportSource, folder: Path) -> list[str]:
    """A stock class of the same widths, relabelled where the family's own refuses them; returns notes."""
    config = stock_config(exported.config, exported.sizes[0])
    assert config is not None
    write_stock_folder(exported, folder, config)
    if config.model_type != exported.config.model_type:
        return [f"saved as {config.model_type}, which computes the same function"]
    return []
