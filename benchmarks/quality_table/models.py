"""The models of the comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimgpt
from slimgpt import assets
from slimgpt.models.lookup import head_dim


@dataclass(frozen=True)
class Model:
    """A model by name; ``path`` is what ``slimgpt.load`` takes, ``None`` where the user has to give it."""

    title: str
    path: str | None
    form: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model


def multi_head(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with as many KV heads as query heads: key and value heads are repeated."""
    config = copy.deepcopy(model.config)
    d = head_dim(config)
    repeats = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    state = model.state_dict()
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = tensor.unflatten(0, (-1, d))
            state[name] = heads.repeat_interleave(repeats, 0).flatten(0, 1)
    wide = type(model)(config).to(model.dtype)
    wide.load_state_dict(state)
    wide.tie_weights()
    return wide.eval()


MODELS: dict[str, Model] = {
    "smollm2": Model("SmolLM2-135M-Instruct, 9 query heads on 3 KV heads", assets.DEMO),
    "smollm2-mha": Model("SmolLM2-135M-Instruct, exact multi-head form (9/9)", assets.DEMO, multi_head),
    "gemma3": Model("Gemma-3-270M", None),
}


def bring(name: str, path: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in fp32 and its tokenizer.

    Args:
        path: what ``slimgpt.load`` takes, for a model that has no path of its own.
    """
    entry = MODELS[name]
    model, tokenizer = slimgpt.load(path or entry.path or name, dtype="float32")
    return entry.form(model), tokenizer


def run_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert parameters and leave buffers: rotary frequencies stay as exact as they are in a loaded model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
