"""The folder that is exported: its config, widths and tensors, mapped from the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from slimgpt.errors import ExportError
from slimgpt.models.architecture import Architecture
from slimgpt.models.build import architecture_of, empty_model
from slimgpt.models.loading import load_config, load_tokenizer
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.source import Source, check_files, locate
from slimgpt.models.streaming import WeightFiles, check_finite, weights_mismatch
from slimgpt.models.unknown_tensors import unknown_text
from slimgpt.models.weight_conversion import ConvertedFiles


@dataclass(frozen=True)
class ExportSource:
    """Config, widths and tensors of the slim folder that an exporter reads.

    Args:
        sizes: the widths of every layer.
        names: the model's tensors in order, tied ones left out.
        on_written: called after every part that is written, a tensor or a layer, with parts done and in all.
    """

    source: Source
    folder: Path
    config: PreTrainedConfig
    architecture: Architecture
    sizes: list[dict[str, int]]
    weights: WeightFiles
    names: list[str]
    on_written: Callable[[int, int], None] | None = None

    def written(self, done: int, total: int) -> None:
        """Tell that so many parts are written."""
        if self.on_written is not None:
            self.on_written(done, total)

    def __getitem__(self, name: str) -> Tensor:
        """A weight.

        Raises:
            NumericalError: NaN or infinity in it.
        """
        tensor = self.weights[name]
        check_finite([(name, tensor)])
        return tensor

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the folder."""
        return load_tokenizer(self.source)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The state dict of a layer."""
        start = f"{self.architecture.layers}.{index}."
        return {name[len(start) :]: self[name] for name in self.names if name.startswith(start)}


def open_folder(name: str | Path, on_written: Callable[[int, int], None] | None = None) -> ExportSource:
    """Open a model folder, dense or slim, without reading its weights.

    Args:
        on_written: see :class:`ExportSource`.

    Raises:
        ExportError: it is no local folder of safetensors files with the tensors of its config.
        ModelError: its config cannot be read or its family is not supported.
    """
    source = locate(str(name))
    if source.folder is None or source.gguf_file or source.adapter is not None:
        raise ExportError(f"{name} is no model folder; give the folder that `slimgpt prune` or save_pretrained wrote")
    config = load_config(source)
    check_files(source)
    model = empty_model(config)
    architecture = architecture_of(config, model)
    weights = ConvertedFiles(source.folder, model)
    problem = weights_mismatch(model, weights)
    if problem is not None:
        raise ExportError(f"{name} cannot be exported: {problem}")
    unknown = weights.unknown(model)
    if unknown:
        raise ExportError(f"{name} cannot be exported: it {unknown_text(unknown)}")
    tied = model.all_tied_weights_keys or {}
    names = [tensor for tensor in model.state_dict() if tensor not in tied]
    return ExportSource(source, source.folder, config, architecture, layer_sizes(config), weights, names, on_written)
