"""A tiny slim model whose layers differ in width, its dense model, and text."""

from __future__ import annotations

import pytest

import slimgpt

SMALL = {"max_length": 24, "batch_size": 8, "micro_batch": 4, "device": "cpu", "bf16": False, "evaluations": 2}
"""Settings that make a run take seconds."""


@pytest.fixture(scope="session")
def slim_folder(dense_folder, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slim") / "slim"
    slimgpt.prune_folder(
        str(dense_folder), folder, ratio=0.4, calibration=str(text_file), num_samples=8, seq_len=24, device="cpu"
    )
    return folder


@pytest.fixture
def recover(slim_folder, text_file, tmp_path):
    """Run ``slimgpt.recover`` on the tiny model, small unless told otherwise."""

    def call(out="recovered", slim=slim_folder, data=None, **settings):
        return slimgpt.recover(slim, tmp_path / out, str(data or text_file), **{**SMALL, "max_steps": 6, **settings})

    return call
