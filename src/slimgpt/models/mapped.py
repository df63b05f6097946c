"""A model folder opened without reading it: the weights are mapped from the files."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.models.build import decoder_layers, empty_model
from slimgpt.models.source import Source, weights_folder
from slimgpt.models.streaming import StreamedModel, weights_mismatch
from slimgpt.models.weight_conversion import ConvertedFiles


def streamed_model(source: Source, config: PreTrainedConfig, stored: torch.dtype) -> StreamedModel | None:
    """The model with embeddings, norms and head mapped and layers that come one by one; ``None`` where the files need
    converting on the way in (GGUF, adapters), so that the model is to be loaded whole.

    Args:
        stored: the type of the weights.
    """
    folder = weights_folder(source) if source.adapter is None else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    empty = empty_model(config)
    weights = ConvertedFiles(folder, empty, stored)
    if weights_mismatch(empty, weights) is not None:
        return None
    streamed = StreamedModel(config, weights, stored)
    streamed.model.config.name_or_path = source.name
    streamed.model.config.dtype = stored
    return streamed


def mapped_model(source: Source, config: PreTrainedConfig, stored: torch.dtype) -> PreTrainedModel | None:
    """The whole model with all weights mapped, in evaluation mode; ``None`` as for :func:`streamed_model`."""
    streamed = streamed_model(source, config, stored)
    if streamed is None:
        return None
    layers = decoder_layers(streamed.model)
    for index in range(len(layers)):
        layers[index] = streamed.layer(index)
    return streamed.model
