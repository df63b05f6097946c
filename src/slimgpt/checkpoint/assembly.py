"""A checkpoint put together from layers that are on disk already, without holding them in memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.checkpoint.folder import settle
from slimgpt.checkpoint.saving import target_form, write_sidecars
from slimgpt.checkpoint.shards import SHARD_BYTES, shard_name, write_index
from slimgpt.errors import OutputError
from slimgpt.models.alignment import write_tensors
from slimgpt.models.heterogeneous import architecture_of
from slimgpt.models.stock import apply_sizes
from slimgpt.pruning.journal import Journal
from slimgpt.pruning.report import PruneReport


def assemble(
    journal: Journal, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, report: PruneReport
) -> Path:
    """Write the checkpoint of a run whose layers are all in its journal, and clear the journal away.

    A model of up to 5 GB becomes one file. In a larger one every layer's file is a shard as it stands: it is linked,
    not copied.

    Args:
        model: what is around the layers; its own layers are not read. Its config gets the new widths.

    Returns:
        The folder.

    Raises:
        OutputError: the disk is full; the layers are kept, and the run can be resumed.
    """
    work = journal.folder / "folder"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        architecture = architecture_of(model.config, model)
        tied = set(model.all_tied_weights_keys or ())
        around = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not name.startswith(f"{architecture.layers}.") and name not in tied
        }
        apply_sizes(model, architecture, [layer.sizes for layer in report.layers])
        cls, config, source = target_form(model)
        config.architectures = [cls.__name__]
        config.save_pretrained(work)
        _write_weights(work, around, [journal.files(layer.layer)[0] for layer in report.layers])
        write_sidecars(work, model, tokenizer, report, source)
        settle(work)
        replaced = journal.folder / "replaced"
        if journal.output.exists():
            journal.output.rename(replaced)
        work.rename(journal.output)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"writing {journal.output} failed: {error}; free some space, then go on with --resume"
        ) from error
    journal.discard()
    return journal.output


def _write_weights(work: Path, around: dict[str, Tensor], layers: list[Path]) -> None:
    sizes = [file.stat().st_size for file in layers]
    rest = sum(tensor.nbytes for tensor in around.values())
    if sum(sizes) + rest <= SHARD_BYTES:
        handles = [safe_open(file, framework="pt") for file in layers]
        tensors = {name: handle.get_tensor(name) for handle in handles for name in handle.keys()}  # noqa: SIM118
        write_tensors({**around, **tensors}, work / "model.safetensors")
        return
    count = len(layers) + 1
    where: dict[str, str] = {}
    total = rest
    first = shard_name(1, count)
    write_tensors(around, work / first)
    where |= dict.fromkeys(around, first)
    for number, file in enumerate(layers, start=2):
        shard = shard_name(number, count)
        _link(file, work / shard)
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                where[name] = shard
                tensor = handle.get_slice(name)
                total += torch.Size(tensor.get_shape()).numel() * _itemsize(tensor.get_dtype())
    write_index(work, where, total)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, name)


def _itemsize(dtype: str) -> int:
    """Bytes of a number of a safetensors type such as ``BF16``."""
    return int("".join(filter(str.isdigit, dtype))) // 8
