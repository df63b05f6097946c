"""A slim model becomes an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from slimgpt.checkpoint.card import model_card
from slimgpt.checkpoint.config_file import write_config
from slimgpt.checkpoint.side_files import copy_side_files
from slimgpt.io.folders import new_folder
from slimgpt.io.shards import write_shards
from slimgpt.io.weight_files import weight_bytes
from slimgpt.models.architecture import is_uniform
from slimgpt.models.build import MODELING_FILE, architecture_of, modeling_source, slim_auto_map, stock_class
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.modeling_slim import SlimMixin
from slimgpt.models.remote_code import code_files
from slimgpt.models.stock_config import stock_config
from slimgpt.models.ties import untie_as_held
from slimgpt.planning.speed_table import SPEED_TABLE_FILE
from slimgpt.pruning.plot import plot_widths
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.thresholds import thresholds

REPORT_FILE = "slimgpt.json"


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruneReport | None,
    folder: str | Path,
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a model as a folder that ``from_pretrained`` loads; it appears whole or not at all.

    Layers of equal widths are written for a stock class, under another family's name where the own one refuses
    the head count: a Llama with 26 of 32 heads is a Mistral without a sliding window. Layers of
    different widths bring a small modeling file and load with ``trust_remote_code=True``.

    Args:
        tokenizer: saved with it, if given.
        report: what :func:`slimgpt.prune` returned; adds ``slimgpt.json``, the model card and a plot.
        overwrite: replace a model folder of that name.
        also: writes further files into the folder before it takes its name.

    Returns:
        The folder.

    Raises:
        OutputError: the folder exists, cannot be written, or its disk is full.
    """
    path = Path(folder).expanduser().absolute()
    with new_folder(path, overwrite) as work:
        config, state, source = saved_form(model)
        write_config(config, work)
        write_shards(work, ({name: tensor} for name, tensor in state.items()), thresholds().shard_bytes)
        write_sidecars(work, model, tokenizer, report, source, model.name_or_path)
        copy_side_files(model.name_or_path, work)
        if also is not None:
            also(work)
    return path


def write_sidecars(
    work: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    report: PruneReport | None,
    source: str | None,
    origin: str | Path | None = None,
) -> None:
    """Everything beside config and weights: generation settings, modeling file, tokenizer, report, plot, card.

    Args:
        source: the text of the modeling file.
        origin: the folder of the model that this one was made from, for its card's licence.
    """
    # transformers refuses to save some generation settings that it reads from the hub without complaint.
    if model.generation_config is not None:
        model.generation_config.to_json_file(work / "generation_config.json")
    if source is not None:
        (work / MODELING_FILE).write_text(source, encoding="utf-8")
    base = next(cls for cls in type(model).__mro__ if not issubclass(cls, SlimMixin))
    for file in code_files(type(model.config), base):
        shutil.copyfile(file, work / file.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    if report is not None:
        (work / REPORT_FILE).write_text(report_text(report), encoding="utf-8")
        if report.speed:
            (work / SPEED_TABLE_FILE).write_text(json.dumps(report.speed["table"], indent=1) + "\n", encoding="utf-8")
        plot_widths(report.dense_sizes, report.plan.layers, work / "widths.png")
        card = model_card(report, weight_bytes(work), own_code=source is not None, origin=origin)
        (work / "README.md").write_text(card, encoding="utf-8")


def target_form(model: PreTrainedModel) -> tuple[type[PreTrainedModel], PreTrainedConfig, str | None]:
    """The class and config that config.json will name, and the text of the modeling file if one is needed."""
    config = model.config
    sizes = layer_sizes(config)
    target = stock_config(config, sizes[0]) if is_uniform(sizes) else None
    if target is not None:
        target.dtype = config.dtype
        return stock_class(target), target, None
    base = next(c for c in type(model).__mro__ if not issubclass(c, SlimMixin))
    cls = type(model)
    target = copy.deepcopy(config)
    target.auto_map = slim_auto_map(base, config)
    return cls, target, modeling_source(base, config, architecture_of(config, model))


def saved_form(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, Tensor], str | None]:
    """The config and tensors that a folder holds, and the text of its modeling file if it needs one.

    Tied weights appear once, and names are those of the family's checkpoints. Nothing is copied.
    """
    untie_as_held(model)
    cls, target, source = target_form(model)
    with torch.device("meta"):
        shell = cls(target)
    shell.load_state_dict(model.state_dict(), strict=True, assign=True)
    shell.tie_weights()
    target.architectures = [cls.__name__]
    target.dtype = model.dtype
    tied = set(shell.all_tied_weights_keys or ())
    state = {name: tensor for name, tensor in shell.state_dict().items() if name not in tied}
    return target, revert_weight_conversion(shell, state), source


def report_text(report: PruneReport) -> str:
    """The report as JSON, with every list of numbers on one line."""
    text = json.dumps(report.to_json(), indent=1)
    return re.sub(r"\[([\d\s,.e+-]+)\]", lambda match: f"[{' '.join(match[1].split())}]", text)
