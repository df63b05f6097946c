"""Runs in processes of their own: killed without mercy and resumed, and several that work together."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import UsageError
from slimgpt.models.lookup import layer_sizes
from slimgpt.runtime.distributed import Ranks
from tests.models.mixtures import tiny_mixture
from tests.pipeline.folders import files_of, report_of, weights_of


def command(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    words = ["prune", model, out, "--calibration", text, "--num-samples", "40", "--seq-len", "60", "--ratio", "0.3"]
    return [sys.executable, "-m", "slimgpt", *map(str, words), "--device", "cpu", *more]


def run(words: list[str]) -> str:
    """What a command prints; in this process, where the fresh one is not the point."""
    done = CliRunner().invoke(app, words[3:])
    assert done.exit_code == 0, done.output
    return done.output


def start(words: list[str], **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(kills, wide, text_file, tmp_path):
    """After some delay without mercy: moments of start-up, measuring, layers, training, writing, and of the end."""
    chance = random.Random(0)
    began = time.perf_counter()
    plain = start(command(wide, tmp_path / "plain", text_file, "--distill", "1500"))
    output, _ = plain.communicate(timeout=300)
    assert plain.returncode == 0, output
    duration = time.perf_counter() - began
    killed = 0
    for _ in range(5 * kills):
        began = time.perf_counter()
        process = start(command(wide, tmp_path / "resumed", text_file, "--distill", "1500", "--resume"))
        try:
            output, _ = process.communicate(timeout=chance.uniform(0.2, 1.0) * duration if killed < kills else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
            continue
        assert process.returncode == 0, output
        if killed == kills:
            break
        duration = min(duration, time.perf_counter() - began)  # the machine is less busy now
        shutil.rmtree(tmp_path / "resumed")  # a finished folder would be left as it is
    assert killed == kills
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "resumed")
    assert report_of(tmp_path / "plain") == report_of(tmp_path / "resumed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "resumed"]


def torchrun(processes: int, words: list[str]) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words[1:]]


@pytest.mark.slow  # `test_ranks.py` holds the same, and more, of Python calls
def test_two_processes_decide_like_one(wide, text_file, tmp_path):
    options = ("--ratio", "0.3")
    run(command(wide, tmp_path / "one", text_file, *options))
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


@pytest.mark.slow
def test_two_processes_choose_between_whole_experts_and_channels_like_one(tokenizer, text_file, tmp_path):
    tiny_mixture("qwen2_moe").save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = ("--ratio", "0.45", "--allocation", "sensitivity", "--distill", "off", "--no-evaluate")
    run(command(tmp_path / "dense", tmp_path / "one", text_file, *options))
    two = start(torchrun(2, command(tmp_path / "dense", tmp_path / "two", text_file, *options)), OMP_NUM_THREADS="1")
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    one, other = (report_of(tmp_path / name)["allocation"]["experts"] for name in ("one", "two"))
    assert one["chosen"] == other["chosen"]
    assert len(one["tried"]) == len(other["tried"]) == 4
    for left, right in zip(one["tried"], other["tried"]):
        assert left["cross_entropy"] == pytest.approx(right["cross_entropy"], rel=1e-5)
        # Sums in another order can send a token to another expert.
        assert left["divergence"] == pytest.approx(right["divergence"], rel=5e-3)
    assert report_of(tmp_path / "one")["plan"] == report_of(tmp_path / "two")["plan"]


def test_a_process_that_dies_ends_all_and_the_run_resumes_with_another_number(wide, text_file, tmp_path):
    words = torchrun(2, command(wide, tmp_path / "slim", text_file))
    with start(words, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1") as process:
        plans = 0
        for line in process.stdout:
            plans += line.startswith("plan:")
            if line.startswith("pruning  layer 2/"):
                break
        assert plans == 1  # one of the two speaks
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
    output = run(command(wide, tmp_path / "slim", text_file, "--resume"))
    assert "layers are finished already" in output
    model, _ = slimgpt.load(str(tmp_path / "slim"))
    assert [s["intermediate_size"] < 700 for s in layer_sizes(model.config)] == [True] * 8
    with safe_open(tmp_path / "slim" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_windows_are_divided_evenly_and_none_is_left_over():
    windows = torch.arange(10).view(5, 2)
    shares = [Ranks(rank, 3).share(windows) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    assert torch.equal(torch.cat(shares), windows)
    with pytest.raises(UsageError, match="2 windows cannot be divided among 3 processes; start fewer"):
        Ranks(2, 3).share(windows[:2])


@pytest.mark.slow  # what its message says is above
def test_fewer_windows_than_processes(wide, text_file, tmp_path):
    words = command(wide, tmp_path / "slim", text_file, "--num-samples", "1")
    process = start(torchrun(2, words), OMP_NUM_THREADS="1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "cannot be divided among 2 processes" in " ".join(output.split())
    assert list(tmp_path.iterdir()) == []
