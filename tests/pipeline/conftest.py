"""Tiny models as folders, and texts that a training can learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import tiny_model


@pytest.fixture
def dense(tmp_path, tokenizer):
    """A tiny model of a family as a folder, in shards that cut through layers."""

    def make(family: str, **changes) -> Path:
        folder = tmp_path / family
        model = tiny_model(family, **changes)
        model.save_pretrained(folder, max_shard_size="30KB")
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def wide(tmp_path_factory, tokenizer) -> Path:
    """A model that takes a second or two, so that there are moments to be killed at."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    tiny_model("llama", num_hidden_layers=8, hidden_size=96, intermediate_size=700).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def same_text(tmp_path_factory) -> Path:
    """A text whose windows are all the same: what helps with one of them helps with the others."""
    file = tmp_path_factory.mktemp("text") / "same.txt"
    file.write_text("strong " * 4000, encoding="utf-8")
    return file


@pytest.fixture
def short_training() -> Iterator[None]:
    """Steps of one window, each of which is saved."""
    with other_thresholds(step_tokens=24, save_interval_s=0.0):
        yield
