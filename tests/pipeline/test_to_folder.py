"""From folder to folder: streamed is as in memory, in shards, in half precision, in every placement."""

from __future__ import annotations

import json

import pytest
import torch

import slimgpt
from slimgpt.runtime.memory import Placement, choose_placement
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import CORE, windows
from tests.pipeline.folders import OPTIONS, files_of, report_of, weights_of

IDS = windows()


IN_EVERY_RUN = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "falcon")
"""Norms of queries and keys, windows and more norms, fused matrices, Conv1D, and attention beside the FFN."""

FAMILIES = [
    pytest.param(family, marks=[pytest.mark.families] + [pytest.mark.slow] * (family not in IN_EVERY_RUN))
    for family in (*CORE, "gpt2", "falcon")
]


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_from_files_is_the_same_as_pruned_in_memory(name, dense, text_file, tmp_path):
    folder = dense(name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    slimgpt.prune_folder(str(folder), tmp_path / "streamed", calibration=str(text_file), **OPTIONS)
    model, tokenizer = slimgpt.load(str(folder))
    report = slimgpt.prune(model, tokenizer, calibration=str(text_file), **OPTIONS)
    slimgpt.save(model, tokenizer, report, tmp_path / "whole")
    streamed, whole = weights_of(tmp_path / "streamed"), weights_of(tmp_path / "whole")
    assert streamed.keys() == whole.keys()
    for key in whole:  # mapped weights begin anywhere in memory, which can change the last bit of a product
        torch.testing.assert_close(streamed[key], whole[key], rtol=1e-4, atol=1e-5)
    outs = [tmp_path / out for out in ("streamed", "whole")]
    kept = [[layer["kept"] for layer in report_of(out)["layers"]] for out in outs]
    assert kept[0] == kept[1]
    configs = [json.loads((out / "config.json").read_text()) for out in outs]
    assert configs[0] == configs[1]
    assert {f.name for f in (tmp_path / "streamed").iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
    slim, _ = slimgpt.load(str(tmp_path / "streamed"))
    with torch.no_grad():
        torch.testing.assert_close(slim(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob(".*"))


def test_large_models_keep_a_shard_per_layer(dense, text_file, tmp_path):
    folder = str(dense("llama"))
    slimgpt.prune_folder(folder, tmp_path / "one", calibration=str(text_file), **OPTIONS)
    with other_thresholds(shard_bytes=1000):
        slimgpt.prune_folder(folder, tmp_path / "many", calibration=str(text_file), **OPTIONS)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 5
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)
    loaded = [slimgpt.load(str(tmp_path / name))[0] for name in ("one", "many")]
    with torch.no_grad():
        assert torch.equal(loaded[0](IDS).logits, loaded[1](IDS).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_type_and_runs_as_asked(dtype, dense, text_file, tmp_path):
    folder = str(dense("llama"))
    for forward in ("float32", dtype):
        out = tmp_path / forward
        report = slimgpt.prune_folder(
            folder, out, calibration=str(text_file), dtype=dtype, forward_dtype=forward, **OPTIONS
        )
        assert report.execution["forward_dtype"] == forward
        assert {t.dtype for t in weights_of(out).values()} == {getattr(torch, dtype)}
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype


PLACEMENTS = (
    Placement(0, "file", "device"),
    Placement(0, "device", "recompute"),
    Placement(0, "host", "host"),
    Placement(0, "file", "recompute", "file"),
)


def test_every_placement_gives_the_same_weights(dense, text_file, tmp_path, monkeypatch):
    folder, options = str(dense("gemma2")), {**OPTIONS, "calibration": str(text_file)}
    slimgpt.prune_folder(folder, tmp_path / "plain", **options)
    plain = weights_of(tmp_path / "plain")
    for number, placement in enumerate(PLACEMENTS):
        monkeypatch.setattr("slimgpt.pipeline.stages.choose_placement", lambda *_, placement=placement: placement)
        slimgpt.prune_folder(folder, tmp_path / str(number), **options)
        placed = weights_of(tmp_path / str(number))
        assert all(torch.equal(plain[name], placed[name]) for name in plain), placement


def test_running_out_of_memory_is_answered_with_a_smaller_budget(dense, text_file, tmp_path, monkeypatch):
    """The device fails once in the middle; the run goes on with less, and the result is the same."""
    from slimgpt.pruning import layer as sequential

    folder = str(dense("llama"))
    slimgpt.prune_folder(folder, tmp_path / "plain", calibration=str(text_file), **OPTIONS)
    solve, budgets, calls = sequential.LayerPruner.solve, [], []

    def fail_once(self, *arguments):
        calls.append(self.index)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        return solve(self, *arguments)

    def remember(need, device, budget=None):
        budgets.append(budget)
        return choose_placement(need, device)

    monkeypatch.setattr(sequential.LayerPruner, "solve", fail_once)
    monkeypatch.setattr("slimgpt.pipeline.stages.choose_placement", remember)
    slimgpt.prune_folder(folder, tmp_path / "failed", calibration=str(text_file), memory="8GB", **OPTIONS)
    assert budgets == [8 * 10**9, 6 * 10**9]
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "failed")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "llama") == ["failed", "plain"]
