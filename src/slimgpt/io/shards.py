"""Weights as safetensors files, written group by group: one file if they are small, shards with an index if not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from slimgpt.io.tensors import write_tensors
from slimgpt.io.weight_files import INDEX_FILE


def write_shards(folder: Path, groups: Iterable[dict[str, Tensor]], limit: int) -> None:
    """Write groups of tensors, each of which stays together; a file is closed before it would pass ``limit`` bytes."""
    drafts: list[Path] = []
    names: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        drafts.append(folder / f"shard-{len(drafts)}.tmp")
        names.append(list(pending))
        write_tensors(pending, drafts[-1])
        pending, size = {}, 0

    for group in groups:
        more = sum(tensor.nbytes for tensor in group.values())
        if pending and size + more > limit:
            flush()
        pending |= group
        size, total = size + more, total + more
    flush()
    if len(drafts) == 1:
        drafts[0].rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, (draft, held) in enumerate(zip(drafts, names), start=1):
        draft.rename(folder / shard_name(number, len(drafts)))
        where |= dict.fromkeys(held, shard_name(number, len(drafts)))
    write_index(folder, where, total)


def shard_name(number: int, count: int) -> str:
    """The name that transformers expects of a shard."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, where: dict[str, str], total: int) -> None:
    """The file that says in which shard each tensor is."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
