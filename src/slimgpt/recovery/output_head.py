"""Whether a model's logits are nothing but a matrix times the hidden states that it returns."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@torch.no_grad()
def has_plain_head(model: nn.Module, ids: Tensor) -> bool:
    """Whether the last hidden states, times the output head, are the logits: no scale, no cap, nothing in between; and
    whether logits can be left out.

    Args:
        model: with or without adapters; where it is divided, every process has to call this.
        ids: a few tokens, ``(1, n)``.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings()  # type: ignore[operator]
    plain = type(head) is nn.Linear or (isinstance(head, nn.Linear) and not hasattr(head, "lora_A"))
    if not plain or "logits_to_keep" not in inspect.signature(base.forward).parameters:  # type: ignore[arg-type]
        return False
    training = model.training
    model.eval()  # dropout would tell them apart
    try:
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        own = F.linear(outputs.hidden_states[-1][:, -1:], head.weight, head.bias)
        return outputs.logits.shape == own.shape and bool(torch.allclose(outputs.logits, own, rtol=1e-3, atol=1e-3))
    finally:
        model.train(training)
