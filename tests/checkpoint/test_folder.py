"""A folder appears whole or not at all."""

import errno

import pytest

from slimgpt.checkpoint.folder import check_output, new_folder
from slimgpt.errors import OutputError


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("there", [False, True])
def test_whatever_goes_wrong_the_old_state_remains(error, there, tmp_path):
    if there:
        (tmp_path / "slim").mkdir()
        (tmp_path / "slim" / "config.json").write_text("old")
    expected = OutputError if isinstance(error, OSError) else error

    def write():
        with new_folder(tmp_path / "slim", overwrite=there) as work:
            (work / "config.json").write_text("new, half")
            raise error

    with pytest.raises(expected):
        write()
    assert [path.name for path in tmp_path.iterdir()] == (["slim"] if there else [])
    if there:
        assert (tmp_path / "slim" / "config.json").read_text() == "old"


def test_a_finished_folder_takes_the_old_ones_place(tmp_path):
    for text in ("first", "second"):
        with new_folder(tmp_path / "slim", overwrite=text == "second") as work:
            (work / "config.json").write_text(text)
            (work / text).write_text("")
            assert not (tmp_path / "slim" / text).exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", "second", "slim"]


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
    with pytest.raises(OutputError, match="cannot write below"):
        check_output(tmp_path / "file" / "new")
