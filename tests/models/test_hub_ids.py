"""Models by their hub id, from a cache folder laid out as huggingface_hub does; no network."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import slimgpt
from tests.models.hub_cache import use_cache

REVISION = "a" * 40
SMALL = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu"}


@pytest.fixture
def hub(dense_folder, tmp_path, monkeypatch):
    """Puts a tied model with a head of its own into an empty cache, and gives its id and its tensors."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--own-head"
    snapshot = repository / "snapshots" / REVISION
    shutil.copytree(dense_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    (snapshot / "LICENSE").write_text("terms")
    tensors = load_file(snapshot / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(97, 48, generator=torch.Generator().manual_seed(3))
    save_file(tensors, snapshot / "model.safetensors", {"format": "pt"})
    use_cache(monkeypatch, cache)
    return "org/own-head", tensors


@pytest.mark.filterwarnings("ignore:.*read as untied")
def test_a_head_of_its_own_is_kept_and_side_files_go_along(hub, text_file, tmp_path):
    name, tensors = hub
    report = slimgpt.prune_folder(name, tmp_path / "slim", calibration=str(text_file), **SMALL)
    assert torch.equal(load_file(tmp_path / "slim" / "model.safetensors")["lm_head.weight"], tensors["lm_head.weight"])
    assert json.loads((tmp_path / "slim" / "config.json").read_text())["tie_word_embeddings"] is False
    assert report.plan.parameters_before == sum(tensor.numel() for tensor in tensors.values())
    assert report.base_model == name
    assert (tmp_path / "slim" / "LICENSE").read_text() == "terms"
    assert str(tmp_path) not in (tmp_path / "slim" / "slimgpt.json").read_text()
    model, _ = slimgpt.load(name)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    assert model.config.tie_word_embeddings is False
