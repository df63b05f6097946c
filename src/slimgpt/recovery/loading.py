"""The models of a recovery: the one that learns, and what is to be divided among processes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from slimgpt.models.loading import load_model
from slimgpt.models.mapped import mapped_model
from slimgpt.models.source import Source
from slimgpt.models.streaming import stored_dtype
from slimgpt.recovery.checks import RecoverRequest
from slimgpt.runtime.devices import as_dtype


def load_learner(request: RecoverRequest) -> PreTrainedModel:
    """The slim model in the type that it is trained in; on the CPU where it is to be divided."""
    device = "cpu" if request.config.shard else request.device
    source, model_config, dtype = learner(request)
    return load_model(source, model_config, dtype, device, request.trust_remote_code)


def learner(request: RecoverRequest) -> tuple[Source, Any, str]:
    """The slim model, its config, and the type that it is trained in."""
    stays = request.dtype != "auto" or request.config.adapters
    return request.source, request.model_config, request.dtype if stays else "float32"


def load_divided(
    request: RecoverRequest, source: Source, model_config: Any, dtype: str
) -> tuple[PreTrainedModel, torch.dtype | None]:
    """A model on the CPU that is to be divided, and the type that its parts get: mapped from its files where these are
    the model as it is, and the type is the stored one or a wider one; else every process reads the whole model."""
    stored, named = stored_dtype(source, model_config, "auto"), as_dtype(dtype)
    target = named if isinstance(named, torch.dtype) else stored
    mapped = mapped_model(source, model_config, stored) if target in (stored, torch.float32) else None
    if mapped is None:
        return load_model(source, model_config, dtype, "cpu", request.trust_remote_code), None
    return mapped, None if target == stored else target
