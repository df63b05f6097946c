"""Sampling of tokens by numbers drawn beforehand, so that the same ones come whatever is generated together."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgpt.errors import NumericalError


def draw(logits: Tensor, uniforms: Tensor, whose: str = "the model") -> Tensor:
    """Sampled tokens, ``(sequences,)``, by inversion of the cumulative distribution.

    Args:
        logits: ``(sequences, vocabulary)``.
        uniforms: between 0 and 1, ``(sequences,)``: which share of the predictions, in the order of the vocabulary, is
            below the token.
        whose: the model, for the message.

    Raises:
        NumericalError: logits that are NaN or infinite.
    """
    below = logits.softmax(-1).cumsum(-1)  # of a vocabulary this is several times faster than torch.multinomial
    if bool(torch.isnan(below[:, -1].sum())):
        raise NumericalError(f"{whose}'s predictions hold NaN or infinity on text of its own")
    places = torch.searchsorted(below, uniforms[:, None] * below[:, -1:], right=True)
    return places.clamp_max(below.shape[-1] - 1)[:, 0]
