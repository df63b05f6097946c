"""Tensors whose names or grouping in the files are others than in the model, as transformers converts them.

Checkpoints of mixtures hold every expert's matrices by themselves; the model stacks them. A streamed layer needs only
its own, so they are stacked when they are asked for.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from slimgpt.models.streaming import WeightFiles
from slimgpt.models.unknown_tensors import unknown_tensors


class ConvertedFiles(WeightFiles):
    """The tensors of a folder by the names that the model gives them.

    Args:
        folder: the model folder.
        model: the model, its empty form will do.

    Raises:
        ModelError: a file cannot be read.
    """

    def __init__(self, folder: Path, model: PreTrainedModel):
        super().__init__(folder)
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        # By the model's name: the files' names with the pattern that each matched; no pattern where it is as stored.
        self._pieces: dict[str, list[tuple[str, str | None]]] = {}
        self._without_place: list[str] = []
        for name in sorted(self._where, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if target in state:
                self._pieces.setdefault(target, []).append((name, pattern))
            else:
                self._without_place.append(target)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if pieces[0][1] is None:
            return super().__getitem__(pieces[0][0])
        return self._convert(name, [(pattern, WeightFiles.__getitem__(self, file)) for file, pattern in pieces])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor once it is converted, from the files' headers."""
        pieces = self._pieces[name]
        if pieces[0][1] is None:
            return super().shape(pieces[0][0])
        empty = [(p, torch.empty(WeightFiles.shape(self, file), device="meta")) for file, p in pieces]
        return tuple(self._convert(name, empty).shape)

    def unknown(self, model: PreTrainedModel) -> list[str]:
        """The names, as the model would have them, of tensors that it does not have and that matter, sorted."""
        return unknown_tensors(model, dict.fromkeys(self._without_place))

    def _convert(self, name: str, tensors: list[tuple[str | None, Tensor]]) -> Tensor:
        converter: Any = deepcopy(self._by_pattern[str(tensors[0][0])])
        for pattern, tensor in tensors:
            converter.add_tensor(name, name, pattern, tensor)
        converted = converter.convert(name)[name]
        return converted[0] if isinstance(converted, list) else converted
