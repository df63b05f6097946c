"""The training of a run from folder to folder: as in memory, resumed, and what it keeps on the disk."""

from __future__ import annotations

import shutil

import pytest
import torch

import slimgpt
from slimgpt.checkpoint import journal as journal_module
from slimgpt.pipeline import journal_sink
from slimgpt.pipeline import to_folder as folders
from tests.models.families import windows
from tests.pipeline.folders import OPTIONS, files_of, report_of

IDS = windows()


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
    needed, kept = [], [0]
    check, assemble = folders.check_output, journal_sink.assemble

    def counted(output, overwrite, size=0):
        needed.append(size)
        return check(output, overwrite, size)

    def look(*_):
        files = [file for file in (tmp_path / ".slim.unfinished").rglob("*") if file.is_file()]
        kept.append(sum(file.stat().st_size for file in files))

    monkeypatch.setattr("slimgpt.pipeline.to_folder.check_output", counted)
    monkeypatch.setattr("slimgpt.pipeline.journal_sink.assemble", lambda *a: (look(), assemble(*a)))
    options = {**OPTIONS, "calibration": str(same_text), "damping": 1.0, "allocation": allocation, "distill": 192}
    report = slimgpt.prune_folder(str(wide), tmp_path / "slim", on_distilled=look, **options)
    assert report.distillation["written_tokens"] == 48
    layers = sum(layer.parameters for layer in report.layers) * 4
    rest = report.plan.parameters * 4 - layers + folders.SIDECAR_BYTES  # comes to the output alone
    assert 0.5 < (needed[0] - rest) / max(kept) < 1.5


def test_a_training_that_the_disk_has_no_room_for_is_not_kept(tmp_path, monkeypatch):
    journal = journal_module.Journal(tmp_path / "slim", "model.layers", {})
    journal.open(False, False)
    usage = shutil.disk_usage(tmp_path)
    for free, is_kept in ((400, False), (401, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage._replace(free=free))
        journal.write_training({"parameter.0": torch.ones(100)})
        assert (journal.training() is not None) == is_kept


@pytest.mark.usefixtures("short_training")
def test_streamed_training_is_the_same_as_in_memory(wide, same_text, tmp_path):
    options = {**OPTIONS, "calibration": str(same_text), "damping": 1.0}
    streamed = slimgpt.prune_folder(str(wide), tmp_path / "streamed", distill=120, **options).distillation
    model, tokenizer = slimgpt.load(str(wide))
    in_memory = slimgpt.prune(model, tokenizer, distill=120, **options).distillation
    assert streamed["curve"] == pytest.approx(in_memory["curve"], rel=1e-3)
    assert streamed["divergence"] == pytest.approx(in_memory["divergence"], rel=1e-3)
    slim, _ = slimgpt.load(str(tmp_path / "streamed"))
    untrained, _ = slimgpt.load(str(wide))
    slimgpt.prune(untrained, tokenizer, distill="off", **options)
    with torch.no_grad():
        logits = [m(IDS).logits for m in (slim, model, untrained)]
    assert (logits[0] - logits[1]).norm() < 0.05 * (logits[0] - logits[2]).norm()
    assert slimgpt.inspect(str(tmp_path / "streamed")).pruned["distillation"]["tokens"] == 120
    assert "trained together on 120 calibration tokens" in (tmp_path / "streamed" / "README.md").read_text()
