"""A cache folder of huggingface_hub for one test."""

from __future__ import annotations

from pathlib import Path

import pytest


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let huggingface_hub and transformers read models from a cache folder, without a network."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
