"""Figures of a recovered model: those of the model before the training say nothing of it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import PreTrainedModel

from slimgpt import assets
from slimgpt.calibration.evaluation_text import BUNDLED, FOR_PEOPLE
from slimgpt.errors import SlimGPTError, one_line
from slimgpt.evaluation.card_figures import text_figures
from slimgpt.evaluation.perplexity import perplexity
from slimgpt.models.loading import load_config, load_model
from slimgpt.models.lookup import context_length
from slimgpt.models.source import locate
from slimgpt.recovery.checks import RecoverRequest

WINDOW, MAX_TOKENS = 256, 4096


def figures_after_training(request: RecoverRequest, model: PreTrainedModel) -> dict[str, Any]:
    """The figures of a recovered model for its report: perplexity on the bundled text, and the divergence from the base
    model where that can be had; nothing where the text is none for it."""
    context = context_length(request.model_config) or WINDOW
    arguments: Any = (model, request.tokenizer, assets.general_text(), min(WINDOW, context), MAX_TOKENS)
    base = _base(request)
    try:
        try:
            result = perplexity(*arguments, against=base)
        except SlimGPTError:
            if base is None:
                raise
            result = perplexity(*arguments)  # the base is another model by now
    except SlimGPTError as error:
        warnings.warn(f"the recovered model is not measured on the bundled text: {one_line(error)}", stacklevel=2)
        return {}
    return {"results": [text_figures(FOR_PEOPLE[BUNDLED], result)]}


def _base(request: RecoverRequest) -> PreTrainedModel | None:
    """The dense model beside the trained one: the teacher, or the one that the report names if it is still there."""
    try:
        if request.teacher is not None:
            source, config = request.teacher
        else:
            assert request.report is not None
            name = request.report.base_model
            source = locate(assets.DEMO if name == assets.MODEL_NAME else name)
            if source.folder is None:  # a hub id: nothing is fetched for a figure
                return None
            config = load_config(source, request.trust_remote_code)
        return load_model(source, config, trust_remote_code=request.trust_remote_code)
    except (SlimGPTError, torch.OutOfMemoryError):
        return None
