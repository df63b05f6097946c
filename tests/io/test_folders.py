"""A folder appears whole or not at all."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from slimgpt.cli.console import check_json
from slimgpt.errors import OutputError
from slimgpt.io.folders import check_output, new_folder, output_lock


def model_folder(folder: Path, card: str = "") -> Path:
    """What looks like a model: a config that names its type, weights, and a card."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("existing", [False, True])
def test_whatever_goes_wrong_the_old_state_remains(error, existing, tmp_path):
    if existing:
        model_folder(tmp_path / "slim", "old")
    expected = OutputError if isinstance(error, OSError) else error

    def write():
        with new_folder(tmp_path / "slim", overwrite=existing) as work:
            (work / "config.json").write_text("new, half")
            raise error

    with pytest.raises(expected):
        write()
    assert [path.name for path in tmp_path.iterdir()] == (["slim"] if existing else [])
    if existing:
        assert (tmp_path / "slim" / "README.md").read_text() == "old"


def test_a_finished_folder_takes_the_old_ones_place(tmp_path):
    for text in ("first", "second"):
        with new_folder(tmp_path / "slim", overwrite=text == "second") as work:
            model_folder(work, text)
            assert text == "first" or (tmp_path / "slim" / "README.md").read_text() == "first"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "slim",
    ]
    assert (tmp_path / "slim" / "README.md").read_text() == "second"


def test_an_empty_folder_may_be_used_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as work:
        (work / "config.json").write_text("")
    with new_folder(tmp_path / "a" / "b") as work:
        (work / "config.json").write_text("")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert (tmp_path / "a" / "b" / "config.json").is_file()


def test_refusals(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("")
    with pytest.raises(OutputError, match="exists"):
        check_output(tmp_path / "data")
    with pytest.raises(OutputError, match="holds no model"):
        check_output(tmp_path / "data", overwrite=True)
    with pytest.raises(OutputError, match="GB free"):
        check_output(tmp_path / "new", needed=1 << 60)
    with pytest.raises(OutputError, match="is a file, and a folder"):
        check_output(tmp_path / "file" / "new")


def test_only_what_looks_like_a_model_is_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    for config in ('{"editor": "vim"}', "[]", "{", '{"model_type": 3}', '{"model_type": "llama"}', "[" * 100_000):
        (tmp_path / "thesis" / "config.json").write_text(config)
        with pytest.raises(OutputError, match="holds no model"):
            check_output(tmp_path / "thesis", overwrite=True)
    model_folder(tmp_path / "thesis")
    (tmp_path / "thesis" / "notes").mkdir()
    (tmp_path / "thesis" / "notes" / "config.json").write_text("{}")  # another one than the model's
    with pytest.raises(OutputError, match=r"2 files .*\(chapter.tex, notes/config.json\).*move them away"):
        check_output(tmp_path / "thesis", overwrite=True)
    check_output(model_folder(tmp_path / "model"), overwrite=True)


def test_what_the_run_reads_is_never_replaced(tmp_path):
    folder = model_folder(tmp_path / "model")
    for source, message in ((folder, "holds the model that is read"), (folder / "README.md", "holds README.md, which")):
        with pytest.raises(OutputError, match=message):
            check_output(folder, overwrite=True, inputs=[source])


def test_links_and_names_that_the_file_system_refuses(tmp_path):
    model_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(OutputError, match="is a symbolic link"):
            check_output(tmp_path / name, overwrite=True)
    for name in ("x" * 250, "x" * 300, f"{'x' * 300}/slim"):
        with pytest.raises(OutputError, match="too long"):
            check_output(tmp_path / name)
    if Path("/proc/self").is_dir():
        with pytest.raises(OutputError, match="cannot write below /proc"):
            check_output("/proc/slim")
        with pytest.raises(OutputError, match="is a mount point"):
            check_output("/proc", overwrite=True)


def read_only(folder, monkeypatch):
    """A folder that may not be written to, not even by root, whom permissions do not hold."""
    create = tempfile.TemporaryFile

    def refuse(*arguments, dir=None, **options):
        if Path(dir) == folder:
            raise PermissionError(errno.EACCES, "Permission denied")
        return create(*arguments, dir=dir, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_read_only_is_refused(overwrite, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    if overwrite:
        model_folder(folder)
    else:
        folder.mkdir()
    read_only(folder, monkeypatch)
    with pytest.raises(
        OutputError, match=r"cannot write below .*model \(Permission denied\); give a folder you may write to"
    ):
        check_output(folder, overwrite)


def test_a_file_for_results_in_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    check_json(tmp_path / "results" / "a.json", overwrite=False)
    read_only(tmp_path / "results", monkeypatch)
    with pytest.raises(OutputError, match=r"cannot write below .*results \(Permission denied\)"):
        check_json(tmp_path / "results" / "a.json", overwrite=True)


def test_two_processes_do_not_write_one_output(tmp_path):
    held = (
        "import sys, pathlib, slimgpt.io.folders as f\n"
        "with f.output_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", held, str(tmp_path / "slim")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process is writing"):
            check_output(tmp_path / "slim")
        with pytest.raises(OutputError, match="another process is writing"), new_folder(tmp_path / "slim"):
            pass
        other.kill()
    check_output(tmp_path / "slim")  # a lock dies with its process
    with output_lock(tmp_path / "slim"), output_lock(tmp_path / "slim"), new_folder(tmp_path / "slim") as work:
        (work / "file").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["slim"]


def test_what_killed_processes_left_is_cleared_and_what_was_being_replaced_comes_back(tmp_path):
    for name in (".slim.partial", ".slim.partial-0123abcd", ".slim.partial-mine", ".slimmer.partial"):
        (tmp_path / name).mkdir()
    model_folder(tmp_path / ".slim.replaced", "old")
    with pytest.raises(OutputError, match="exists"), new_folder(tmp_path / "slim"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".slim.partial-mine", ".slimmer.partial", "slim"]
    assert (tmp_path / "slim" / "README.md").read_text() == "old"
    assert json.loads((tmp_path / "slim" / "config.json").read_text()) == {"model_type": "llama"}
