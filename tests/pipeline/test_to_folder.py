"""From folder to folder: streamed is as in memory, killed and resumed as uninterrupted, many processes as one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import slimgpt
from slimgpt.checkpoint import journal as journal_module
from slimgpt.errors import OutputError, ResumeError, UsageError
from slimgpt.layerwise.context import ExecutionContext, activation_store_for
from slimgpt.models.lookup import layer_sizes
from slimgpt.pipeline import journal_sink
from slimgpt.pipeline import to_folder as folders
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import MemoryRequirement, Placement, choose_placement, limit_gpu_memory
from slimgpt.runtime.thresholds import other_thresholds
from slimgpt.runtime.units import parse_bytes
from tests.models.families import CORE, tiny_model, windows

IDS = windows()
OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu", "batch_size": 3}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds seconds."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "slimgpt.json"}


def report_of(folder: Path) -> dict:
    """The report without seconds."""
    report = json.loads((folder / "slimgpt.json").read_text())
    for part in (report, *report["layers"], report["allocation"], report["distillation"], report["divergence"]):
        part.pop("seconds", None)
    return report


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


@pytest.mark.parametrize("family", [*CORE, "gpt2", "falcon"])
def test_streamed_from_files_is_the_same_as_pruned_in_memory(family, dense, text_file, tmp_path):
    folder = dense(family)
    assert len(list(folder.glob("*.safetensors"))) > 2
    slimgpt.prune_folder(str(folder), tmp_path / "streamed", calibration=str(text_file), **OPTIONS)
    model, tokenizer = slimgpt.load(str(folder))
    report = slimgpt.prune(model, tokenizer, calibration=str(text_file), **OPTIONS)
    slimgpt.save(model, tokenizer, report, tmp_path / "whole")
    streamed, whole = weights_of(tmp_path / "streamed"), weights_of(tmp_path / "whole")
    assert streamed.keys() == whole.keys()
    for name in whole:  # mapped weights begin anywhere in memory, which can change the last bit of a product
        torch.testing.assert_close(streamed[name], whole[name], rtol=1e-4, atol=1e-5)
    kept = [[layer["kept"] for layer in report_of(tmp_path / n)["layers"]] for n in ("streamed", "whole")]
    assert kept[0] == kept[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("streamed", "whole")]
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


@pytest.mark.parametrize(
    "placement",
    [
        Placement(0, "file", "device"),
        Placement(0, "device", "recompute"),
        Placement(0, "host", "host"),
        Placement(0, "file", "recompute", "file"),
    ],
)
def test_every_placement_gives_the_same_weights(placement, dense, text_file, tmp_path, monkeypatch):
    folder = str(dense("gemma2"))
    slimgpt.prune_folder(folder, tmp_path / "plain", calibration=str(text_file), **OPTIONS)
    monkeypatch.setattr("slimgpt.pipeline.stages.choose_placement", lambda *_: placement)
    slimgpt.prune_folder(folder, tmp_path / "placed", calibration=str(text_file), **OPTIONS)
    plain, placed = weights_of(tmp_path / "plain"), weights_of(tmp_path / "placed")
    assert all(torch.equal(plain[name], placed[name]) for name in plain)


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


def test_places_follow_the_budget(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("slimgpt.runtime.memory.used_bytes", lambda _: 100)
    monkeypatch.setattr("slimgpt.runtime.memory.free_bytes", lambda _: 1000)
    need = MemoryRequirement(layer=100, solver=300, stream=50, kept=400)
    assert choose_placement(need, cpu, 1000) == Placement(1000, "device", "device")
    assert choose_placement(need, cpu, 899) == Placement(899, "device", "recompute")
    assert choose_placement(need, gpu, 899) == Placement(899, "device", "host")
    assert choose_placement(need, cpu, 480) == Placement(480, "file", "recompute")
    assert choose_placement(need, gpu, 480).stream == "host"
    assert choose_placement(need, cpu, 350).gram == "file"
    for device, budget in ((cpu, 290), (gpu, 390)):
        with pytest.raises(UsageError, match="too small"):
            choose_placement(need, device, budget)
    assert choose_placement(need, cpu) == Placement(950, "device", "device")


@pytest.mark.parametrize(("text", "size"), [("8GB", 8e9), ("1.5 GiB", 1.5 * 2**30), ("800mb", 8e8), ("123", 123)])
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 bananas", "8GB@2"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(UsageError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(("name", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_a_gpu_is_held_to_the_budget_whether_or_not_it_has_a_number(name, index, monkeypatch):
    """torch's own checks run; only what needs a driver is replaced."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: calls.append(given), raising=False)
    for budget in (8 * 10**9, 800 * 10**9):
        limit_gpu_memory(torch.device(name), budget)
    assert calls == [(0.1, index), (1.0, index)]


def test_a_shelf_in_a_file_gives_back_what_was_put(tmp_path):
    shelf = ActivationStore("file", torch.device("cpu"), tmp_path)
    for round_number in range(2):
        for number in range(3):
            shelf.put(number, torch.full((2, 5), float(number + round_number), dtype=torch.bfloat16))
    assert all(torch.equal(shelf.get(n), torch.full((2, 5), n + 1.0, dtype=torch.bfloat16)) for n in range(3))
    assert shelf.take(1).sum() == 20
    with pytest.raises(KeyError):
        shelf.get(1)


@pytest.mark.parametrize(
    ("device", "scratch", "size", "place"),
    [
        ("cuda", True, 2, "device"),  # a quarter of the room there
        ("cuda", True, 4, "host"),
        ("cuda", True, 50, "file"),  # more than half of the host's memory
        ("cuda", False, 50, "file"),
        ("cpu", False, 2, "device"),
        ("cpu", False, 4, "file"),
        ("cpu", True, 2, "file"),
    ],
)
def test_what_is_large_is_kept_farther_off(device, scratch, size, place, tmp_path, monkeypatch):
    for name, found in (("used_bytes", 0), ("free_bytes", 100 * 10**9)):
        monkeypatch.setattr(f"slimgpt.layerwise.context.{name}", lambda _, found=found: found)
    placement = Placement(10 * 10**9, "device", "device")
    run = ExecutionContext(torch.device(device), placement, scratch=tmp_path if scratch else None)
    assert activation_store_for(run, size * 10**9).place == place


# Killed and resumed


@pytest.fixture(scope="module")
def wide(tmp_path_factory, tokenizer) -> Path:
    """A model that takes a second or two, so that there are moments to be killed at."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    tiny_model("llama", num_hidden_layers=8, hidden_size=96, intermediate_size=700).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    words = ["prune", model, out, "--calibration", text, "--num-samples", "40", "--seq-len", "60", "--ratio", "0.3"]
    return [sys.executable, "-m", "slimgpt", *map(str, words), "--device", "cpu", *more]


def start(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


def test_killed_at_every_layer_and_resumed_is_the_same_to_the_byte(wide, text_file, tmp_path):
    """In one process: the run ends after a layer as if killed there, again and again."""
    options = {**OPTIONS, "calibration": str(text_file)}
    slimgpt.prune_folder(str(wide), tmp_path / "plain", **options)

    class Killed(BaseException):
        pass

    def kill(report, _):
        if report.layer in remaining:
            remaining.remove(report.layer)
            raise Killed

    remaining, ends = {0, 1, 3, 6, 7}, 0
    while True:
        try:
            slimgpt.prune_folder(str(wide), tmp_path / "resumed", resume=True, on_layer=kill, **options)
            break
        except Killed:
            ends += 1
            assert not (tmp_path / "resumed").exists()
    assert ends == 5
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "resumed")
    assert report_of(tmp_path / "plain") == report_of(tmp_path / "resumed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "resumed"]


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


@pytest.mark.usefixtures("short_training")
def test_killed_in_the_training_and_resumed_is_the_same_to_the_byte(wide, same_text, tmp_path, monkeypatch):
    # More tokens than there are: the dense model writes the others, once.
    options = {**OPTIONS, "calibration": str(same_text), "damping": 1.0, "distill": 192}
    plain = slimgpt.prune_folder(str(wide), tmp_path / "plain", **options)
    assert plain.distillation["kept"]
    assert plain.distillation["written_tokens"] == 48
    assert plain.distillation["steps"] == 8

    class Killed(BaseException):
        pass

    def kill(step, *_):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        slimgpt.prune_folder(str(wide), tmp_path / "resumed", on_distilled=kill, **options)
    write, count = journal_module.write_tensors, 0

    def write_two(tensors, file):
        nonlocal count
        count += file.parent.name == "distilled"
        if count == 3:
            raise Killed
        write(tensors, file)

    def never(*_):
        raise Killed

    monkeypatch.setattr("slimgpt.distillation.data.generate_text", never)
    steps = []
    # While trained layers are written, and when the training is finished and the folder is not.
    for name, instead in (("checkpoint.journal.write_tensors", write_two), ("pipeline.journal_sink.assemble", never)):
        with monkeypatch.context() as patch:
            patch.setattr(f"slimgpt.{name}", instead)
            with pytest.raises(Killed):
                slimgpt.prune_folder(
                    str(wide), tmp_path / "resumed", resume=True, on_distilled=lambda n, *_: steps.append(n), **options
                )
    assert steps == [*range(3, 8), 7]
    slimgpt.prune_folder(str(wide), tmp_path / "resumed", resume=True, on_distilled=never, **options)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "resumed")
    assert report_of(tmp_path / "plain") == report_of(tmp_path / "resumed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "resumed"]


@pytest.mark.parametrize("allocation", ["schedule", "search"])
def test_what_a_training_keeps_on_the_disk_is_counted_before(allocation, wide, same_text, tmp_path, monkeypatch):
    needed, seen = [], [0]
    check, assemble = folders.check_output, journal_sink.assemble

    def counted(output, overwrite, size=0):
        needed.append(size)
        return check(output, overwrite, size)

    def look(*_):
        files = [file for file in (tmp_path / ".slim.unfinished").rglob("*") if file.is_file()]
        seen.append(sum(file.stat().st_size for file in files))

    monkeypatch.setattr("slimgpt.pipeline.to_folder.check_output", counted)
    monkeypatch.setattr("slimgpt.pipeline.journal_sink.assemble", lambda *a: (look(), assemble(*a)))
    options = {**OPTIONS, "calibration": str(same_text), "damping": 1.0, "allocation": allocation, "distill": 192}
    report = slimgpt.prune_folder(str(wide), tmp_path / "slim", on_distilled=look, **options)
    assert report.distillation["written_tokens"] == 48
    layers = sum(layer.parameters for layer in report.layers) * 4
    rest = report.plan.parameters * 4 - layers + folders.SIDECAR_BYTES  # comes to the output alone
    assert 0.5 < (needed[0] - rest) / max(seen) < 1.5


def test_a_training_that_the_disk_has_no_room_for_is_not_kept(tmp_path, monkeypatch):
    journal = journal_module.Journal(tmp_path / "slim", "model.layers", {})
    journal.open(False, False)
    usage = shutil.disk_usage(tmp_path)
    for free, there in ((400, False), (401, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage._replace(free=free))
        journal.write_training({"parameter.0": torch.ones(100)})
        assert (journal.training() is not None) == there


@pytest.mark.usefixtures("short_training")
def test_streamed_training_is_the_same_as_in_memory(wide, same_text, tmp_path):
    options = {**OPTIONS, "calibration": str(same_text), "damping": 1.0}
    said = slimgpt.prune_folder(str(wide), tmp_path / "streamed", distill=120, **options).distillation
    model, tokenizer = slimgpt.load(str(wide))
    there = slimgpt.prune(model, tokenizer, distill=120, **options).distillation
    assert said["curve"] == pytest.approx(there["curve"], rel=1e-3)
    assert said["divergence"] == pytest.approx(there["divergence"], rel=1e-3)
    slim, _ = slimgpt.load(str(tmp_path / "streamed"))
    untrained, _ = slimgpt.load(str(wide))
    slimgpt.prune(untrained, tokenizer, distill="off", **options)
    with torch.no_grad():
        logits = [m(IDS).logits for m in (slim, model, untrained)]
    assert (logits[0] - logits[1]).norm() < 0.05 * (logits[0] - logits[2]).norm()
    reloaded = slimgpt.inspect(tmp_path / "streamed")
    assert reloaded is not None
    assert "trained together on 120 calibration tokens" in (tmp_path / "streamed" / "README.md").read_text()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(kills, wide, text_file, tmp_path):
    """After some delay without mercy: moments of start-up, measuring, layers, training, writing, and of the end."""
    chance = random.Random(0)
    began = time.perf_counter()
    plain = start(command(wide, tmp_path / "plain", text_file, "--distill", "1500"))
    output, _ = plain.communicate(timeout=300)
    assert plain.returncode == 0, output
    duration = time.perf_counter() - began
    killed = 0
    while True:
        process = start(command(wide, tmp_path / "resumed", text_file, "--distill", "1500", "--resume"))
        if killed < kills:
            try:
                process.wait(chance.uniform(0.3, 1.0) * duration)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                killed += 1
                continue
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        if killed == kills:
            break
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "resumed")
    assert report_of(tmp_path / "plain") == report_of(tmp_path / "resumed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "resumed"]


@pytest.mark.parametrize("moment", ["config", "weights", "card", "replace", "rename", "discard"])
def test_killed_while_the_folder_is_put_together(moment, wide, text_file, tmp_path, monkeypatch):
    options = {**OPTIONS, "calibration": str(text_file), "overwrite": True}
    slimgpt.prune_folder(str(wide), tmp_path / "plain", **options)
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "resumed" / "model.safetensors").write_bytes(b"")

    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    targets = {
        "config": "slimgpt.checkpoint.assemble_folder.target_form",
        "weights": "slimgpt.checkpoint.assemble_folder._write_weights",
        "card": "slimgpt.checkpoint.saving.model_card",
        "discard": "slimgpt.checkpoint.journal.Journal.discard",
    }
    rename = Path.rename

    def one_rename(path, target):
        if path.name == ("resumed" if moment == "replace" else "folder"):
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        if moment in targets:
            patch.setattr(targets[moment], kill)
        else:
            patch.setattr(Path, "rename", one_rename)
        patch.setattr("slimgpt.checkpoint.journal.Journal.close", lambda _: True)  # a killed process tidies nothing
        with pytest.raises(Killed):
            slimgpt.prune_folder(str(wide), tmp_path / "resumed", **options)
    slimgpt.prune_folder(str(wide), tmp_path / "resumed", resume=True, **options)
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "resumed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "resumed"]


def unfinished(wide, text_file, out):
    def stop(report, _):
        if report.layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="--resume"):
        slimgpt.prune_folder(str(wide), out, calibration=str(text_file), on_layer=stop, **OPTIONS)


def test_another_request_is_refused_with_the_difference_named(wide, text_file, tmp_path, dense):
    out = tmp_path / "slim"
    unfinished(wide, text_file, out)
    call = {**OPTIONS, "calibration": str(text_file), "resume": True}
    with pytest.raises(ResumeError, match=r"settings ratio was 0\.3, now 0\.25"):
        slimgpt.prune_folder(str(wide), out, **{**call, "ratio": 0.25})
    with pytest.raises(ResumeError, match="settings seed was 0, now 1"):
        slimgpt.prune_folder(str(wide), out, **{**call, "seed": 1})
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    with pytest.raises(ResumeError, match="calibration source"):
        slimgpt.prune_folder(str(wide), out, **{**call, "calibration": str(other)})
    with pytest.raises(ResumeError, match="model name was wide, now llama"):
        slimgpt.prune_folder(str(dense("llama")), out, **call)
    model = tiny_model("llama", num_hidden_layers=8, hidden_size=96, intermediate_size=700)
    model.model.layers[7].mlp.down_proj.weight.data += 1
    model.save_pretrained(tmp_path / "copy" / "wide")
    slimgpt.load(str(wide))[1].save_pretrained(tmp_path / "copy" / "wide")
    with pytest.raises(ResumeError, match="model files differs"):
        slimgpt.prune_folder(str(tmp_path / "copy" / "wide"), out, **call)


def test_an_unfinished_run_is_neither_continued_nor_dropped_unasked(wide, text_file, tmp_path):
    out = tmp_path / "slim"
    unfinished(wide, text_file, out)
    with pytest.raises(ResumeError, match="pass --resume"):
        slimgpt.prune_folder(str(wide), out, calibration=str(text_file), **OPTIONS)
    slimgpt.prune_folder(str(wide), out, calibration=str(text_file), overwrite=True, **{**OPTIONS, "ratio": 0.2})
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]
    # A finished run that is asked to resume has nothing to do; another one may not touch its folder.
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    options = {**OPTIONS, "calibration": str(text_file), "resume": True}
    report = slimgpt.prune_folder(str(wide), out, **{**options, "ratio": 0.2})
    assert report.to_json() == slimgpt.inspect(str(out)).pruned | {"settings": report.to_json()["settings"]} | {
        key: report.to_json()[key] for key in ("plan", "dense_sizes", "layers")
    }
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(OutputError, match="exists"):
        slimgpt.prune_folder(str(wide), out, **options)


def test_damaged_layers_of_an_unfinished_run_are_refused(wide, text_file, tmp_path):
    out = tmp_path / "slim"
    unfinished(wide, text_file, out)
    file = tmp_path / ".slim.unfinished" / "layers" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ResumeError, match="damaged"):
        slimgpt.prune_folder(str(wide), out, calibration=str(text_file), resume=True, **OPTIONS)


# More than one process


def torchrun(processes: int, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words[1:]]


def test_two_processes_decide_like_one(wide, text_file, tmp_path):
    options = ("--ratio", "0.3")
    one = start(command(wide, tmp_path / "one", text_file, *options), OMP_NUM_THREADS="1")
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    two = start(torchrun(2, command(wide, tmp_path / "two", text_file, *options)), OMP_NUM_THREADS="1")
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    assert output.count("plan:") == output.count("saved") == 1  # one of them speaks
    left, right = report_of(tmp_path / "one"), report_of(tmp_path / "two")
    assert right["execution"]["processes"] == 2
    assert [layer["kept"] for layer in left["layers"]] == [layer["kept"] for layer in right["layers"]]
    weights = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-5 * tensor.norm(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_process_that_dies_ends_all_and_the_run_resumes_with_another_number(wide, text_file, tmp_path):
    words = torchrun(2, command(wide, tmp_path / "slim", text_file))
    with start(words, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1") as process:
        for line in process.stdout:
            if line.startswith("layer 1:"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("this system does not list a process's children")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        assert process.returncode != 0
    assert "--resume" in output  # whether it lost contact first or was told to end
    assert "src/slimgpt" not in output  # a message, no traceback
    assert [path.name for path in tmp_path.iterdir()] == [".slim.unfinished"]
    slim = start(command(wide, tmp_path / "slim", text_file, "--resume"))
    output, _ = slim.communicate(timeout=300)
    assert slim.returncode == 0, output
    assert "layers are finished already" in output
    model, _ = slimgpt.load(str(tmp_path / "slim"))
    assert [s["intermediate_size"] < 700 for s in layer_sizes(model.config)] == [True] * 8
    with safe_open(tmp_path / "slim" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_fewer_windows_than_processes(wide, text_file, tmp_path):
    words = command(wide, tmp_path / "slim", text_file, "--num-samples", "1")
    process = start(torchrun(2, words), OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "cannot be divided among 2 processes" in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []
