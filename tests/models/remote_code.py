"""Folders of a small model whose class comes from its repository; see `remote/`."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimgpt

CODE = Path(__file__).parent / "remote"
AUTO_MAP = {
    "AutoConfig": "configuration_tiny_baichuan.TinyBaichuanConfig",
    "AutoModelForCausalLM": "modeling_tiny_baichuan.TinyBaichuanForCausalLM",
}


def remote_classes() -> tuple[Any, Any]:
    """The config's and the model's class, imported from the repository's files as an ordinary package."""
    sys.path.insert(0, str(CODE.parent))
    try:
        modeling = importlib.import_module("remote.modeling_tiny_baichuan")
    finally:
        sys.path.pop(0)
    return modeling.TinyBaichuanConfig, modeling.TinyBaichuanForCausalLM


@contextmanager
def described(architecture: slimgpt.Architecture) -> Iterator[None]:
    """The family is in the table for a while."""
    before = dict(slimgpt.ARCHITECTURES)
    slimgpt.register("tiny_baichuan", architecture)
    try:
        yield
    finally:
        slimgpt.ARCHITECTURES.clear()
        slimgpt.ARCHITECTURES.update(before)


def remote_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedModel:
    """Write a random model with its code beside it, and return it."""
    config_class, model_class = remote_classes()
    torch.manual_seed(0)
    model = model_class(config_class(**changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in CODE.glob("*.py"):
        shutil.copyfile(file, folder / file.name)
    config = folder / "config.json"
    values = {**json.loads(config.read_text(encoding="utf-8")), "auto_map": AUTO_MAP}
    config.write_text(json.dumps(values), encoding="utf-8")
    return model
