"""Multimodal models: the language models inside them, and where these are."""

from __future__ import annotations

from dataclasses import replace

from slimgpt.models.architecture import Entry
from slimgpt.models.families.dense import _SEPARATE

PARTS: dict[str, Entry] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), replace(_SEPARATE, resized=True)),
    "qwen3_vl_text": _SEPARATE,
}
"""Language models that exist only inside multimodal ones."""


MULTIMODAL: dict[str, str] = {
    **dict.fromkeys(
        (
            "gemma3",
            "llava",
            "llava_next",
            "llava_onevision",
            "mistral3",
            "paligemma",
            "internvl",
            "got_ocr2",
            "aya_vision",
        ),
        "model.language_model",
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "model.language_model"),
    **dict.fromkeys(("smolvlm", "idefics3"), "model.text_model"),
}
"""Models with a language model of the tables inside, and the module that it is; all else in them stays."""
