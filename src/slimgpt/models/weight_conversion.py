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
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from slimgpt.models.streaming import WeightFiles
from slimgpt.models.unknown_tensors import unknown_tensors

Piece = tuple[str, str | None]
"""A name in the files, and the pattern of the converter that it matched; no pattern where it is as stored."""


class ConvertedFiles(WeightFiles):
    """The tensors of a folder by the names that the model gives them.

    Args:
        folder: the model folder.
        model: the model, its empty form will do.
        dtype: what quantised tensors become.

    Raises:
        ModelError: a file cannot be read.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16):
        super().__init__(folder, dtype)
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        state = model.state_dict()
        self._pieces: dict[str, list[Piece]] = {}  # by the model's name
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
        stacked = self._stack(pieces)
        if stacked is None:
            return self._convert(name, [(pattern, WeightFiles.__getitem__(self, file)) for file, pattern in pieces])
        # One expert at a time: what is de-quantised is not mapped, and would be in memory three times.
        result = torch.empty(0)
        for index, expert in enumerate(stacked):
            own = self._convert(name, [(pattern, WeightFiles.__getitem__(self, file)) for file, pattern in expert])
            if index == 0:
                result = own.new_empty(len(stacked), *own.shape[1:])
            result[index] = own[0]
        return result

    def mapped(self, name: str) -> bool:
        """Whether a tensor is used where it lies in its file."""
        pieces = self._pieces.get(name, [])
        return len(pieces) == 1 and pieces[0][1] is None and super().mapped(pieces[0][0])

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

    def _stack(self, pieces: list[Piece]) -> list[list[Piece]] | None:
        """The pieces of every matrix that the converter stacks; ``None`` where it does more than that."""
        merge, *others = self._by_pattern[str(pieces[0][1])].operations
        plain = isinstance(merge, MergeModulelist) and merge.dim == 0
        if not plain or not all(isinstance(other, Concatenate) and other.dim > 0 for other in others):
            return None
        by_pattern: dict[str | None, list[Piece]] = {}
        for piece in pieces:
            by_pattern.setdefault(piece[1], []).append(piece)
        counts = {len(own) for own in by_pattern.values()}
        return [list(expert) for expert in zip(*by_pattern.values())] if len(counts) == 1 else None

    def _convert(self, name: str, tensors: list[tuple[str | None, Tensor]]) -> Tensor:
        converter: Any = deepcopy(self._by_pattern[str(tensors[0][0])])
        for pattern, tensor in tensors:
            converter.add_tensor(name, name, pattern, tensor)
        converted = converter.convert(name)[name]
        return converted[0] if isinstance(converted, list) else converted
