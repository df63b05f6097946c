"""How commands end where the machine refuses: full disks, closed output, Ctrl-C; and names with square brackets."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.cli.console import handle_errors, write_file
from slimgpt.errors import NumericalError, OutputError, RankError
from slimgpt.pipeline import to_folder
from slimgpt.runtime import interrupts
from slimgpt.runtime.interrupts import heed_interrupts

SMALL = ("--num-samples", 8, "--seq-len", 24, "--device", "cpu", "--ratio", 0.3)
FULL = Path("/dev/full")


def start(words, **options):
    """A ``slimgpt`` process that an interrupt reaches, even where the tests run in the background and ignore it."""
    command = [sys.executable, "-m", "slimgpt", *map(str, words)]
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], ["families"], ["inspect", "FOLDER", "--json"], ["inspect", "FOLDER"]]
)
def test_a_full_standard_output_is_one_line(words, dense_folder):
    with FULL.open("w") as full:
        process = start([str(dense_folder) if word == "FOLDER" else word for word in words], stdout=full)
        _, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert stderr.startswith("error: writing standard output or a temporary file failed")
    assert len(stderr.splitlines()) == 1


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_results_are_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(OutputError, match="/dev/full failed"):
        write_file(FULL, "text")
    file = tmp_path / "result.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_file(file, "half \ud800")
    assert file.read_text() == "old"
    write_file(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("result.json", "new")]


@pytest.mark.parametrize("seconds", [0.1, 0.2, 0.4, 0.8])
def test_an_interrupt_while_the_libraries_are_imported_says_no_more_than_that(seconds, dense_folder):
    process = start(["inspect", dense_folder], stdout=subprocess.PIPE, start_new_session=True)
    time.sleep(seconds)  # from when Python itself is up to when torch is being imported
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode in (130, -signal.SIGINT), stderr  # a shell says 130 of both
    assert stderr.startswith("interrupted")
    assert len(stderr.splitlines()) == 1


LIMITED = """
import json, resource, signal, sys
from typer.testing import CliRunner
from slimgpt.cli import app

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits, *words = sys.argv[1:]
endings = []
for most in json.loads(limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    done = CliRunner().invoke(app, [word.replace("LIMIT", str(most)) for word in words])
    endings.append((done.exit_code, type(done.exception).__name__, done.stderr))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(endings))
"""

LIMITS = {
    1_000: ("journal.json failed, nothing was left there", False),  # the request
    5_000: ("has no room for", False),  # activations of the first layer
    100_000: ("has no room for", True),  # what training keeps
    200_000: ("go on with --resume", True),  # the weights
}


def test_wherever_the_disk_is_full_one_line_says_so(dense_folder, text_file, tmp_path):
    """In a process of its own, which no file may grow in beyond a limit."""
    for most in LIMITS:
        (tmp_path / str(most)).mkdir()
    words = ["prune", dense_folder, tmp_path / "LIMIT/slim", "--calibration", text_file, *SMALL, "--num-samples", 64]
    command = [sys.executable, "-c", LIMITED, json.dumps(list(LIMITS)), *words, "--distill", 2000]
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path / "plots")}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for (most, (message, kept)), (code, error, stderr) in zip(LIMITS.items(), json.loads(done.stdout)):
        assert (code, error) == (2, "SystemExit"), (most, stderr)
        assert message in " ".join(stderr.split())
        names = [path.name for path in (tmp_path / str(most)).iterdir()]
        assert names == ([".slim.unfinished"] if kept else []), most


def test_square_brackets_in_a_name_are_text(dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[").mkdir()
    words = {
        "prune": ["prune", dense_folder, "a[/b]", "--calibration", text_file, *SMALL],
        "inspect": ["inspect", "a[/b]"],
        "export": ["export", "a[/b]", "a[/c]", "--to", "padded"],
        "plan": ["plan", "a[/b]", "--ratio", 0.2, "--save", "a[/plan].toml"],
        "recover": ["recover", "a[/b]", "a[/d]", "--data", text_file, "--max-length", 24, "--max-steps", 1,
                    "--batch-size", 4, "--device", "cpu"],
    }  # fmt: skip
    for name, line in words.items():
        result = CliRunner().invoke(app, [str(word) for word in line])
        assert result.exit_code == 0, (name, result.output)
        written = [word for word in map(str, line) if word.startswith("a[/")][-1]
        assert written in result.output or name == "inspect", result.output
    again = CliRunner().invoke(app, [str(word) for word in words["prune"]])
    assert again.exit_code == 2
    assert "a[/b] exists" in "".join(again.output.split("\n"))


@pytest.mark.parametrize("command", ["scan", "compare", "export", "evaluate", "inspect"])
def test_what_every_process_would_do_anew_is_refused_under_torchrun(command, dense_folder, tmp_path, monkeypatch):
    words = {
        "scan": [dense_folder, "--out", tmp_path / "scan"],
        "compare": [dense_folder, dense_folder, "--out", tmp_path / "compare"],
        "export": [dense_folder, tmp_path / "padded", "--to", "padded"],
        "evaluate": [dense_folder],
        "inspect": [dense_folder],
    }[command]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        result = CliRunner().invoke(app, [command, *map(str, words)])
        assert result.exit_code == 2
        message = f"{command} runs in one process, and WORLD_SIZE is 2; start it without torchrun"
        assert (message in " ".join(result.stderr.split())) == (rank == "0")  # one line from all of them
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["padded", "gguf"])
def test_the_place_of_an_export_is_looked_at_before_the_run(form, dense_folder, text_file, tmp_path):
    target = tmp_path / ("slim.gguf" if form == "gguf" else "slim-padded")
    target.symlink_to(tmp_path / "nothing")
    words = ["prune", dense_folder, tmp_path / "slim", "--calibration", text_file, *SMALL, "--export", form]
    for more in ([], ["--overwrite"]):
        result = CliRunner().invoke(app, [str(word) for word in (*words, *more)])
        assert result.exit_code == 2
        assert "is a symbolic link" in " ".join(result.output.split())
        assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("kind", ["pipe", "endless link", "device"])
def test_options_are_read_from_regular_files_only(kind, tmp_path):
    file = tmp_path / "options.toml"
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file if kind == "endless link" else "/dev/zero")
    result = CliRunner().invoke(app, ["inspect", "model", "--config", str(file)])
    assert result.exit_code == 2
    assert "no regular file" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("length", [250, 300])
def test_names_that_no_file_system_takes_are_one_line(length, dense_folder, text_file, tmp_path):
    long = tmp_path / ("x" * length)
    device = ["--device", "cpu"]
    for words in (
        ["prune", dense_folder, long, "--calibration", text_file, *SMALL],
        ["prune", dense_folder, tmp_path / "slim", "--calibration", f"{long}.txt", *SMALL],
        ["prune", dense_folder, tmp_path / "slim", "--plan", long, "--calibration", text_file],
        ["export", dense_folder, long, "--to", "padded"],
        ["export", dense_folder, f"{long}.gguf", "--to", "gguf"],
        ["plan", dense_folder, "--save", f"{long}.toml"],
        ["evaluate", dense_folder, "--text", text_file, "--json", f"{long}.json", *device],
        ["evaluate", dense_folder, "--text", long, *device],
        ["scan", dense_folder, "--out", f"{long}{long.name}", "--calibration", text_file, *device],
        ["inspect", long],
        ["inspect", dense_folder, "--config", long],
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, (words, result.output, result.exception)
        assert "ETA" not in result.output, words  # before any work
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_not_there_is_one_line(dense_folder):
    words = ["speed", dense_folder, "--batch", 10**12, "--prompt", 8, "--new-tokens", 2, "--no-memory"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--device", "cpu")])
    assert result.exit_code == 2, result.exception
    assert "error: not enough memory: " in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize("command", ["scan", "speed", "plan"])
def test_places_that_nothing_can_be_written_to_are_refused_before_the_work(command, dense_folder, tmp_path):
    (tmp_path / "folder" / "scan.json").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    words = {
        "scan": ["scan", dense_folder, "--out"],
        "speed": ["speed", dense_folder, "--overwrite", "--json"],
        "plan": ["plan", dense_folder, "--ratio", 0.3, "--overwrite", "--save"],
    }[command]
    for name in ("folder", "link"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slimgpt.models.loading.load_config", None)  # nothing is read
            result = CliRunner().invoke(app, [str(word) for word in (*words, tmp_path / name)])
        assert result.exit_code == 2, result.exception
        assert "is a folder, or a link" in result.stderr or "leads nowhere; give another --out" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_a_command_has_ended_leaves_no_traceback(number):
    """As ``torchrun`` sends it to a process that has just said why it ends."""
    code = (
        "import atexit, sys, time\n"
        "from slimgpt.cli import main\n"
        "from slimgpt.runtime.interrupts import heed_interrupts\n"
        "heed_interrupts()  # as commands do\n"
        "atexit.register(lambda: (print('leaving', flush=True), time.sleep(60)))\n"
        "sys.argv = ['slimgpt', '--version']; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline().startswith("slimgpt ")
        assert process.stdout.readline() == "leaving\n"
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (-number, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("error", "ending"), [(RankError, "lost"), (NumericalError, "infinite")])
def test_a_signal_while_a_failed_run_is_cleared_away_does_not_replace_its_error(
    number, error, ending, dense_folder, tmp_path, monkeypatch, capsys
):
    """As ``torchrun`` sends it to a process that is about to say that it lost contact."""
    monkeypatch.setattr(interrupts, "_arrived", False)  # as it was, afterwards
    sent = []

    def cleared(*_args: object, **_options: object) -> None:
        sent.append(number)
        signal.raise_signal(number)

    def fail(*_args: object) -> None:
        monkeypatch.setattr(shutil, "rmtree", cleared)
        raise error(ending)

    monkeypatch.setattr(to_folder, "_run_in_memory", fail)

    @handle_errors
    def command() -> None:
        ids = torch.zeros(8, 24, dtype=torch.long)
        slimgpt.prune_folder(dense_folder, tmp_path / "slim", 0.3, ids, device="cpu")

    # What runs in the background of a shell ignores SIGINT, which is heeded nowhere then.
    before = {each: signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        heed_interrupts()
        with pytest.raises(typer.Exit) as end:
            command()
        with pytest.raises(KeyboardInterrupt):  # heeded again
            signal.raise_signal(number)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert sent
    assert end.value.exit_code == 2
    assert capsys.readouterr().err.endswith(f"error: {ending}\n")
