"""Whether the output head is the input embedding: by the config, by the files and by the model in memory."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.models.lookup import text_config


def is_tied(config: PreTrainedConfig) -> bool:
    """Whether a config says that the head is the embedding."""
    return bool(getattr(config, "tie_word_embeddings", False))


def untie(config: PreTrainedConfig) -> None:
    """Write into a config that the head is a matrix of its own."""
    for part in (config, text_config(config)):
        part.tie_word_embeddings = False


def untie_as_held(model: PreTrainedModel) -> None:
    """Untie the config of a model in memory whose head is not its embedding, as transformers leaves it after loading
    files with a head of their own."""
    if not is_tied(model.config):
        return
    for head, embedding in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        one, other = model.get_parameter_or_buffer(head), model.get_parameter_or_buffer(embedding)
        if one is not other and one.device.type != "meta" and not torch.equal(one, other.to(one.device)):
            untie(model.config)
            model.all_tied_weights_keys = {}
            warn_untied(model.config.name_or_path or type(model).__name__, head)
            return


def untie_weights(model: PreTrainedModel) -> None:
    """Give the head of a tied model a copy of the embedding of its own."""
    for head, embedding in (model.all_tied_weights_keys or {}).items():
        owner, _, leaf = head.rpartition(".")
        tied = model.get_parameter(embedding)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tied.detach().clone(), tied.requires_grad))
    model.all_tied_weights_keys = {}
    untie(model.config)


def warn_untied(name: str, head: str) -> None:
    """Say that a head of its own is kept against the config."""
    warnings.warn(
        f"{name}: tie_word_embeddings is true in its config, and its {head} differs from the input embedding; it is "
        "read as untied, as transformers does. Write false there to silence this",
        stacklevel=3,
    )
