"""Tensors in a model's files that the model of its config does not have: which are harmless, and which are not."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedModel

from slimgpt.errors import ModelError

HARMLESS = (
    r"(^|\.)rotary\w*\.(inv_freq|cos_cached|sin_cached)$",  # computed from the config
    r"(^|\.)position_ids$",  # 0, 1, 2, ...
    r"(^|\.)embed_positions\.weights$",  # XGLM's sines; learned positions are called weight
    r"(^|\.)(attn|attention)\.(masked_)?bias$",  # causal masks of GPT-2 and its kin
)
"""Buffers of earlier versions of transformers, all computed today."""

PREDICTION = r"(^|\.)mtp_layers\."
"""MiMo's layers that predict a second token, which its own class leaves out of the text, too."""


def unknown_tensors(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Names in the files that the model has no tensor for, but for those that are harmless or that its class ignores.

    Classes leave out what belongs to another task: layers that predict a second token, towers of another modality.
    """
    ignored = re.compile("|".join(f"({pattern})" for pattern in (*HARMLESS, PREDICTION, *_ignored(model))))
    return sorted(name for name in names if not ignored.search(name))


def refuse_unknown(where: str, unknown: list[str]) -> None:
    """Refuse a model some of whose tensors would be dropped.

    Raises:
        ModelError: with their number and the name of the first.
    """
    if unknown:
        raise ModelError(f"{where} {unknown_text(unknown)}")


def unknown_text(unknown: list[str]) -> str:
    """The message about files that hold such tensors, with the cure."""
    tensors = "a tensor" if len(unknown) == 1 else f"{len(unknown)} tensors"
    return (
        f"holds {tensors} that the model of its config does not have, the first is {unknown[0]}; without them it is "
        "another model. Give the config.json that belongs to the files (num_hidden_layers, attention_bias, "
        "architectures), or remove the tensors from the files if they are not wanted"
    )


def _ignored(model: PreTrainedModel) -> Iterable[str]:
    return model._keys_to_ignore_on_load_unexpected or ()
