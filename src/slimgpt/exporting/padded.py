"""Every layer as wide as the widest, with zeros: any engine runs it, and it computes the same function.

Zeros add nothing, so results are equal to the bit as long as the engine treats the numbers that are not padding alike:
activation functions may differ in the last bit between whole vectors and what is left over at the end, and a longer sum
may be cut into other pieces (figures in docs/guides/serving.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from slimgpt.errors import ExportError
from slimgpt.exporting.hf_folder import write_stock_folder
from slimgpt.exporting.source import ExportSource
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes
from slimgpt.models.build import empty_model
from slimgpt.models.lookup import with_sizes
from slimgpt.models.stock_config import stock_config
from slimgpt.planning.stock_forms import padded_problem, padded_sizes, uniform_problem


def check(exported: ExportSource) -> None:
    """Refuse what cannot be padded, before any work.

    Raises:
        ExportError: no stock class takes the widths.
    """
    if (problem := padded_problem(exported.config, exported.sizes)) is not None:
        uniform = "prune with --uniform, or " if uniform_problem(exported.config) is None else ""
        raise ExportError(f"{exported.source.name}: {problem}; {uniform}load it with its own modeling file")


def write(exported: ExportSource, folder: Path) -> list[str]:
    """Write the padded model into ``folder``; returns notes."""
    target = padded_sizes(exported.sizes)
    config = stock_config(with_sizes(exported.config, target), target)
    assert config is not None
    architecture = exported.architecture
    kinds, columns = architecture.rows(), architecture.columns()
    whole = empty_model(config).get_submodule(architecture.layers)

    def layer(index: int) -> dict[str, Tensor]:
        sizes, state = exported.sizes[index], exported.layer(index)
        for module, fields in kinds.items():
            for leaf in ("weight", "bias"):
                if (name := f"{module}.{leaf}") in state:
                    state[name] = _pad_rows(state[name], fields, sizes, target)
        for module, field in columns.items():
            if (name := f"{module}.weight") in state:  # a layer without attention lacks its output matrix
                state[name] = _pad(state[name].T, field, sizes, target).T.contiguous()
        if not sizes[HEADS]:  # an attention, and its norms, of nothing but zeros
            dtype = next(iter(state.values())).dtype
            shapes = whole.get_submodule(str(index)).state_dict()
            state |= {
                name: torch.zeros(empty.shape, dtype=dtype) for name, empty in shapes.items() if name not in state
            }
        return state

    write_stock_folder(exported, folder, config, layer)
    before, after = _count(exported.sizes), _count([target] * len(exported.sizes))
    return [f"padding is zeros: {after / before:.2f} times the widths of the slim model, so it saves less"]


def _pad_rows(tensor: Tensor, fields: tuple[str, ...], sizes: Sizes, target: Sizes) -> Tensor:
    """A tensor whose rows are stacked projections, each padded by itself."""
    total = sum(sizes[field] for field in fields)
    pieces = tensor.split([len(tensor) * sizes[field] // total for field in fields])
    return torch.cat([_pad(piece, field, sizes, target) for piece, field in zip(pieces, fields)])


def _pad(rows: Tensor, field: str, sizes: Sizes, target: Sizes) -> Tensor:
    """Rows of one projection padded with zeros; query heads stay on the KV head that they read."""
    if field != HEADS:
        d = len(rows) // sizes[field]
        return torch.cat([rows, rows.new_zeros((target[field] - sizes[field]) * d, *rows.shape[1:])])
    kv, new_kv = sizes[KV_HEADS], target[KV_HEADS]
    group, new_group = sizes[field] // kv, target[field] // new_kv
    d = len(rows) // sizes[field]
    wide = rows.new_zeros(new_kv, new_group, d, *rows.shape[1:])
    wide[:kv, :group] = rows.reshape(kv, group, d, *rows.shape[1:])
    return wide.flatten(0, 2)


def _count(sizes: list[dict[str, int]]) -> int:
    return sum(layer[HEADS] * 64 + layer[CHANNELS] for layer in sizes)
