"""The tables of families against what the installed transformers has, and against published configs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from slimgpt.errors import SlimGPTError
from slimgpt.models.build import empty_model
from slimgpt.models.families import ARCHITECTURES, MULTIMODAL, PARTS, REFUSED
from slimgpt.models.loading import load_config
from slimgpt.models.lookup import lookup, missing_module
from slimgpt.models.parameter_counts import describe
from slimgpt.models.source import locate

CONFIGS = Path(__file__).resolve().parents[3] / "shared" / "configs"

PUBLISHED = {
    "Qwen__Qwen3-0.6B": 0.596e9,
    "Llama-3.1-8B-Instruct": 8.03e9,
    "Mistral-7B-Instruct-v0.3": 7.25e9,
    "Qwen2.5-VL-7B-Instruct": 8.29e9,
    "phi-4": 14.66e9,
    "openai__gpt-oss-20b": 20.9e9,
    "Qwen__Qwen3-235B-A22B": 235.1e9,
    "meta-llama__Llama-4-Scout-17B-16E-Instruct": 108.6e9,
    "nvidia__NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": 31.6e9,
    "deepseek-ai__DeepSeek-V3": 671.0e9,
    "MiniMaxAI__MiniMax-M2.5": 228.7e9,
    "moonshotai__Kimi-K2-Instruct": 1026e9,
    "zai-org__GLM-5": 744e9,
}
"""What the model cards say, in parameters; prediction layers that transformers does not build are not counted."""

NOT_PLANNED = {
    "MiniMaxAI__MiniMax-M3": "does not recognize",
    "chatglm2-6b": "Python code of its own",
    "deepseek-ai__DeepSeek-V4-Flash": "hyper-connections",
    "deepseek-ai__DeepSeek-V4-Pro": "hyper-connections",
    "moonshotai__Kimi-K3": "Python code of its own",
    "nvidia__Llama-3_3-Nemotron-Super-49B-v1": "Python code of its own",
    "sgl-project__DeepSeek-V4-Flash-FP8": "does not recognize",
    "sgl-project__DeepSeek-V4-Pro-FP8": "does not recognize",
}
"""Published configs that are refused, and a part of the reason."""


def test_every_type_of_transformers_is_described_or_refused():
    types = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    known = {*ARCHITECTURES, *PARTS, *MULTIMODAL, *REFUSED}
    assert not types - known, "describe these families, or say why they are refused"
    assert not (set(REFUSED) & {*ARCHITECTURES, *PARTS, *MULTIMODAL})


@pytest.mark.parametrize("model_type", sorted(MULTIMODAL))
def test_the_language_model_lies_where_the_table_says(model_type):
    try:
        config = AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = AutoModelForImageTextToText._model_mapping[type(config)](config)
    except (ImportError, KeyError, TypeError, ValueError) as error:
        pytest.skip(f"the default config builds no model here: {error}")
    architecture = lookup(config)
    if architecture is None:  # the default config is of a kind that is refused; others of the family are not
        assert callable(ARCHITECTURES[config.get_text_config(decoder=True).model_type])
        return
    assert missing_module(model, architecture) is None


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="the published configs are not here")
@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_published_configs_are_counted_or_refused_for_a_reason_that_is_true(file, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(file, folder / "config.json")
    if file.stem in NOT_PLANNED:
        with pytest.raises(SlimGPTError, match=re.escape(NOT_PLANNED[file.stem])):
            describe(config := load_config(locate(str(folder))), empty_model(config))
        return
    config = load_config(locate(str(folder)))
    shape = describe(config, empty_model(config))
    assert json.loads(file.read_text())["model_type"] in {config.model_type, "kimi_k2", "mimo"}
    if file.stem in PUBLISHED:
        assert shape.parameters == pytest.approx(PUBLISHED[file.stem], rel=0.01)
