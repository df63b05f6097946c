"""Whether a model's logits are nothing but a matrix times the hidden states that it returns."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimgpt.models.lookup import text_config


@torch.no_grad()
def has_plain_head(model: nn.Module, ids: Tensor, bf16: bool = False) -> bool:
    """Whether the last hidden states, times the output head, are the logits: no scale, no cap, nothing in between; and
    whether logits can be left out.

    Args:
        model: with or without adapters; where it is divided, every process has to call this.
        ids: a few tokens, ``(1, n)``.
        bf16: whether the forward pass multiplies in bfloat16 by autocast.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    head = base.get_output_embeddings()
    plain = type(head) is nn.Linear or (isinstance(head, nn.Linear) and not hasattr(head, "lora_A"))
    if not plain or "logits_to_keep" not in inspect.signature(base.forward).parameters:
        return False
    if getattr(text_config(base.config), "final_logit_softcapping", None):  # small logits would not show it
        return False
    training = model.training
    model.eval()  # dropout would tell them apart
    try:
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
        own = F.linear(*head_operands(outputs.hidden_states[-1][:, -1:], head, bf16))
        return outputs.logits.shape == own.shape and torch.equal(outputs.logits.float(), own.float())
    finally:
        model.train(training)


def head_operands(hidden: Tensor, head: Any, bf16: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states, weight and bias of an output head in the type in which the model multiplies them.

    Args:
        hidden: as the model returns them; accelerate makes fp32 of what autocast computed.
        bf16: whether autocast multiplies in bfloat16.
    """
    dtype = torch.bfloat16 if bf16 else head.weight.dtype
    return hidden.to(dtype), head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
