"""Contents of a model folder, without loading its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.errors import ModelError, one_line
from slimgpt.io.result import Result
from slimgpt.io.weight_files import weight_bytes
from slimgpt.models.architecture import is_uniform
from slimgpt.models.config_files import read_object
from slimgpt.models.loading import load_config
from slimgpt.models.parameter_counts import LayerShape, describe
from slimgpt.models.source import check_files, locate
from slimgpt.models.streaming import stored_dtype
from slimgpt.pruning.report import PruneReport


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """The shape of a model, dense or slim.

    Args:
        layers: widths and parameters of every layer.
        parameters: of the whole model, tied weights once.
        bytes: of the weights on disk; ``None`` for a hub id.
        uniform: whether all layers have the same widths.
        pruned: the content of ``slimgpt.json``; ``None`` for a model we did not prune.
        quantization: how its files are quantised, and what they are read as; ``None`` if they are not.
    """

    model: str
    model_type: str
    layers: tuple[LayerShape, ...]
    parameters: int
    layer_parameters: int
    bytes: int | None
    uniform: bool
    pruned: dict[str, Any] | None
    quantization: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)


def inspect(name: str, trust_remote_code: bool = False) -> Inspection:
    """Look at a model from its config and file headers.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``demo``.

    Raises:
        ModelError: it cannot be found, read, or supported.
    """
    source = locate(name)
    config = load_config(source, trust_remote_code)
    shape = describe(config)
    quantization = source.quantization
    size = pruned = None
    if source.folder is not None:
        if source.gguf_file:
            size = (source.folder / source.gguf_file).stat().st_size
        else:
            check_files(source)
            size = weight_bytes(source.folder)
            pruned = read_report(source.folder)
            if pruned is not None and len(pruned["dense_sizes"]) != len(shape.layers):
                raise ModelError(
                    f"{source.folder / REPORT_FILE} is of a model of {len(pruned['dense_sizes'])} layers, and by "
                    f"config.json there are {len(shape.layers)}; mend num_hidden_layers there, or delete the report"
                )
    return Inspection(
        model=source.name,
        model_type=config.model_type,
        layers=shape.layers,
        parameters=shape.parameters,
        layer_parameters=shape.layer_parameters,
        bytes=size,
        uniform=is_uniform([layer.sizes for layer in shape.layers]),
        pruned=pruned,
        quantization=None if quantization is None else quantization.to_json(stored_dtype(source, config, "auto")),
    )


def read_report(folder: Path) -> dict[str, Any] | None:
    """The content of ``slimgpt.json``; ``None`` for a folder that has none.

    Raises:
        ModelError: it is damaged.
    """
    file = folder / REPORT_FILE
    if not file.is_file():
        return None
    report = read_object(file)
    try:
        PruneReport.from_json(report)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{file} is damaged ({type(error).__name__}: {one_line(error)}); it must be as `prune` wrote it: take it "
            "from there, or delete it, and the folder is read as any other model"
        ) from error
    return report
