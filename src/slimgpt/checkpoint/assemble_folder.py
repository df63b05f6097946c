"""A checkpoint put together from layers that are on disk already, without holding them in memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from slimgpt.checkpoint.config_file import write_config
from slimgpt.checkpoint.journal import Journal
from slimgpt.checkpoint.saving import target_form, write_sidecars
from slimgpt.checkpoint.side_files import copy_side_files
from slimgpt.errors import OutputError
from slimgpt.io.folders import fsync_tree, replace_folder
from slimgpt.io.shards import shard_name, write_index
from slimgpt.io.tensors import write_tensors
from slimgpt.models.build import architecture_of
from slimgpt.models.slicing import State
from slimgpt.models.stock_config import apply_sizes
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.thresholds import thresholds


def assemble(
    journal: Journal,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruneReport,
    origin: Path | None = None,
) -> Path:
    """Write the checkpoint of a run whose layers are all in its journal, and clear the journal away.

    A model of up to 5 GB becomes one file. In a larger one every layer's file is a shard as it stands: it is linked,
    not copied.

    Args:
        model: what is around the layers; its own layers are not read. Its config gets the new widths.
        origin: the dense model's folder, where its side files lie.

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
        write_config(config, work)
        with torch.device("meta"):
            shell = cls(config)
        files = [journal.weights(layer.layer) for layer in report.layers]
        _write_weights(work, around, files, partial(revert_weight_conversion, shell))
        write_sidecars(work, model, tokenizer, report, source, origin)
        copy_side_files(origin, work)
        fsync_tree(work)
        replace_folder(work, journal.output, journal.folder / "replaced")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"writing {journal.output} failed: {error}; free some space, then go on with --resume"
        ) from error
    journal.discard()
    return journal.output


def _write_weights(work: Path, around: State, layers: list[Path], convert: Callable[[State], State]) -> None:
    """Write the tensors around the layers, and those of the layers from their files.

    Args:
        convert: from the model's names to those that files of its class have.
    """
    sizes = [file.stat().st_size for file in layers]
    around = convert(around)
    rest = sum(tensor.nbytes for tensor in around.values())
    if sum(sizes) + rest <= thresholds().shard_bytes:
        tensors = {name: tensor for file in layers for name, tensor in convert(load_file(file)).items()}
        write_tensors({**around, **tensors}, work / "model.safetensors")
        return
    count = len(layers) + 1
    first = shard_name(1, count)
    write_tensors(around, work / first)
    where, total = dict.fromkeys(around, first), rest
    for number, file in enumerate(layers, start=2):
        shard = shard_name(number, count)
        stored = load_file(file)  # mapped
        tensors = convert(stored)
        if tensors.keys() == stored.keys():
            _link(file, work / shard)
        else:
            write_tensors(tensors, work / shard)
        where |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(work, where, total)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, name)
