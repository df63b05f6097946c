"""Killed in one process at every layer and while the folder is put together, and resumed: the same to the byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import slimgpt
from slimgpt.errors import OutputError, ResumeError
from tests.models.families import tiny_model
from tests.pipeline.folders import OPTIONS, files_of, report_of


@pytest.fixture(scope="module")
def plain(wide, text_file, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    slimgpt.prune_folder(str(wide), folder, calibration=str(text_file), **OPTIONS)
    return folder


def test_killed_at_every_layer_and_resumed_is_the_same_to_the_byte(plain, wide, text_file, tmp_path):
    """In one process: the run ends after a layer as if killed there, again and again."""
    options = {**OPTIONS, "calibration": str(text_file)}

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
    assert files_of(plain) == files_of(tmp_path / "resumed")
    assert report_of(plain) == report_of(tmp_path / "resumed")
    assert [path.name for path in tmp_path.iterdir()] == ["resumed"]


def test_what_killed_processes_left_beside_the_output_is_cleared(wide, text_file, tmp_path):
    for name in (".slim.partial", ".slim.partial-0123abcd", ".slim.partial-mine"):
        (tmp_path / name).mkdir()
    slimgpt.prune_folder(str(wide), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".slim.partial-mine", "slim"]
    shutil.rmtree(tmp_path / ".slim.partial-mine")
    (tmp_path / "slim").rename(tmp_path / ".slim.replaced")  # as a kill leaves it that came amid an --overwrite
    with pytest.raises(OutputError, match="slim exists"):
        slimgpt.prune_folder(str(wide), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]
    assert slimgpt.load(str(tmp_path / "slim"))[0].config.num_hidden_layers == 8


@pytest.mark.parametrize("moment", ["config", "weights", "card", "replace", "rename", "discard"])
def test_killed_while_the_folder_is_put_together(moment, plain, wide, text_file, tmp_path, monkeypatch):
    options = {**OPTIONS, "calibration": str(text_file), "overwrite": True}
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
    assert files_of(plain) == files_of(tmp_path / "resumed")
    assert [path.name for path in tmp_path.iterdir()] == ["resumed"]


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


@pytest.mark.parametrize("name", ["00001.safetensors", "00001.json"])
def test_a_changed_byte_of_a_kept_layer_is_refused(name, wide, text_file, tmp_path):
    out = tmp_path / "slim"
    unfinished(wide, text_file, out)
    file = tmp_path / ".slim.unfinished" / "layers" / name
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResumeError, match=rf"{name} is damaged .*start anew with --overwrite"):
        slimgpt.prune_folder(str(wide), out, calibration=str(text_file), resume=True, **OPTIONS)
    assert not out.exists()


def test_damaged_layers_of_an_unfinished_run_are_refused(wide, text_file, tmp_path):
    out = tmp_path / "slim"
    unfinished(wide, text_file, out)
    file = tmp_path / ".slim.unfinished" / "layers" / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ResumeError, match="damaged"):
        slimgpt.prune_folder(str(wide), out, calibration=str(text_file), resume=True, **OPTIONS)
