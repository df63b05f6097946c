"""Several Gloo processes that write, measure, prune, train and compare together, beside one that does it alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimgpt
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.row_shards import RowShards
from slimgpt.runtime.thresholds import other_thresholds
from tests.killing import kill
from tests.models.families import tiny_model
from tests.pipeline.test_to_folder import report_of, weights_of

ROOT = Path(__file__).resolve().parents[2]

PRUNE = """
import json, sys
import slimgpt
from slimgpt.runtime.thresholds import other_thresholds

options = json.loads(sys.argv[1])
with other_thresholds(**options.pop("thresholds")):
    slimgpt.prune_folder(**options)
"""

COLLECTIVES = """
import os, sys
from pathlib import Path
import torch
from slimgpt.runtime import distributed
from slimgpt.runtime.distributed import join
from slimgpt.runtime.row_shards import RowShards

distributed.MESSAGE_BYTES = 16  # rows are gathered in several messages
folder = Path(sys.argv[1])
shapes = [(7, 2), (2, 3, 2), (5,), (1, 4)]
with join(torch.device("cpu")) as ranks:
    every = [[torch.randn(shape, generator=torch.Generator().manual_seed(10 * rank + place))
              for place, shape in enumerate(shapes)] for rank in range(ranks.world)]
    sums = [torch.stack(parts).double().sum(0).float() for parts in zip(*every)]
    shards = RowShards(ranks)
    own = shards.start_sum(every[ranks.rank])()
    for part, whole in zip(own, sums, strict=True):
        assert torch.allclose(part, whole.tensor_split(ranks.world)[ranks.rank], atol=1e-6)
    shared = [tensor.clone() for tensor in every[ranks.rank]]
    shards.share(shared)
    for place, tensor in enumerate(shared):
        rows = [every[rank][place].tensor_split(ranks.world)[rank] for rank in range(ranks.world)]
        assert torch.equal(tensor, torch.cat(rows))
    rows = torch.arange(22.).view(11, 2).bfloat16()
    own = rows[ranks.rows(11)]
    gathered = torch.cat([own, own.new_zeros(11 - len(own), 2)]) if ranks.main else own
    ranks.gather_rows(gathered)
    assert torch.equal(gathered, rows if ranks.main else own)
    assert ranks.texts("é" * ranks.rank) == ["é" * rank for rank in range(ranks.world)]
    assert ranks.values({"a": [1, 0.1]} if ranks.main else None) == {"a": [1, 0.1]}
    assert ranks.sums([float(ranks.rank), 0.1]) == [3.0, sum([0.1] * 3)]
    assert ranks.see(folder)
    (folder / str(ranks.rank)).mkdir()
    assert not ranks.see(folder / str(ranks.rank))
    pair = ranks.first(2)
    assert pair.member == (ranks.rank < 2) and ranks.first(1).member == ranks.main and ranks.first(3) is ranks
    if pair.member:
        assert pair.sums([1.0]) == [2.0] and pair.agree(5 - ranks.rank) == 5
    ranks.agree(0)
    (folder / f"{ranks.rank}.passed").touch()
"""


@pytest.fixture
def script(tmp_path) -> Path:
    file = tmp_path / "prune.py"
    file.write_text(PRUNE, encoding="utf-8")
    return file


def start(processes: int, *words) -> subprocess.Popen:
    """Python in some processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def dense(folder: Path, tokenizer, family: str, **changes) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path, output: Path, **changes) -> str:
    """Every phase in a few seconds: text that the model writes, for the calibration and for the training, too."""
    values = {
        "model": str(model), "output": str(output), "ratio": 0.3, "num_samples": 24, "seq_len": 48, "device": "cpu",
        "batch_size": 3, "forward_dtype": "float32", "allocation": "search", "distill": 1500, "thresholds": {},
    }  # fmt: skip
    return json.dumps({**values, **changes})


def run_alone(words: str) -> None:
    """The same in this process: starting another one takes longer than the run."""
    values = json.loads(words)
    with other_thresholds(**values.pop("thresholds")):
        slimgpt.prune_folder(**values)


def assert_agree(one: Path, many: Path, processes: int, measured: float = 1e-5) -> None:
    """The same text, the same plan, and the same weights up to the order of sums.

    Args:
        measured: relative, of the divergence that was measured.
    """
    left, right = report_of(one), report_of(many)
    assert right["execution"]["processes"] == processes
    assert left["calibration"]["sha256"] == right["calibration"]["sha256"]
    assert left["plan"] == right["plan"]
    assert [layer["kept"] for layer in left["layers"]] == [layer["kept"] for layer in right["layers"]]
    for name in ("tokens", "written_tokens", "held_out_tokens", "steps", "kept"):
        assert left["distillation"][name] == right["distillation"][name], name
    assert right["distillation"]["curve"] == pytest.approx(left["distillation"]["curve"], rel=1e-4)
    assert right["allocation"]["divergence"] == pytest.approx(left["allocation"]["divergence"], rel=measured)
    for name, text in left["divergence"].items():
        if isinstance(text, dict):
            assert right["divergence"][name]["kl"]["mean"] == pytest.approx(text["kl"]["mean"], rel=1e-4)
            assert right["divergence"][name]["sha256"] == text["sha256"]
    weights = weights_of(one), weights_of(many)
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-4 * tensor.norm(), name


def test_sums_rows_and_texts_of_three_processes(tmp_path):
    (tmp_path / "collectives.py").write_text(COLLECTIVES, encoding="utf-8")
    finish(start(3, tmp_path / "collectives.py", tmp_path))
    assert len(list(tmp_path.glob("*.passed"))) == 3


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_rows_are_divided_as_tensor_split_does_it(world, count):
    rows = torch.arange(count)
    for rank, part in enumerate(rows.tensor_split(world)):
        assert torch.equal(rows[Ranks(rank, world).rows(count)], part)


def test_one_process_owns_all_rows_and_copies_nothing():
    shards, tensors = RowShards(Ranks()), [torch.ones(3, 2), torch.ones(4)]
    summed = shards.start_sum(tensors)()
    assert all(a is b for a, b in zip(summed, tensors, strict=True))
    assert shards.own(tensors[0]).data_ptr() == tensors[0].data_ptr()


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen3_moe", {"allocation": "sensitivity", "distill": 600})]
)
def test_two_processes_write_measure_and_train_like_one(family, changes, script, tokenizer, tmp_path):
    model = dense(tmp_path / "dense", tokenizer, family, num_hidden_layers=4 if family == "llama" else 2)
    run_alone(options(model, tmp_path / "1", **changes))
    finish(start(2, script, options(model, tmp_path / "2", **changes)))
    assert_agree(tmp_path / "1", tmp_path / "2", 2)
    report = report_of(tmp_path / "2")
    assert report["calibration"]["self_written"]
    assert report["distillation"]["kept"]
    assert report["allocation"]["contributions"]
    if family == "llama":
        assert report["distillation"]["written_tokens"] > 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_two_processes_find_the_same_costs_of_whole_attentions(script, tokenizer, tmp_path):
    """Three batches of the comparison, of which two are run without attention: ten windows, of which one process has
    six and the other four of its first five."""
    model = dense(tmp_path / "dense", tokenizer, "llama", num_hidden_layers=4)
    changes = {"drop_attention": True, "allocation": "auto", "distill": "off", "evaluate": False, "batch_size": 5}
    run_alone(options(model, tmp_path / "1", **changes))
    finish(start(2, script, options(model, tmp_path / "2", **changes)))
    left, right = (report_of(tmp_path / name) for name in "12")
    assert left["plan"] == right["plan"]
    for one, two in zip(left["allocation"]["contributions"], right["allocation"]["contributions"], strict=True):
        assert (one["layer"], one["unit"]) == (two["layer"], two["unit"])
        assert two["cost"] == pytest.approx(one["cost"], rel=1e-3, abs=1e-7)
    assert {part["unit"] for part in left["allocation"]["contributions"]} >= {"attention", "ffn"}
    assert right["allocation"]["divergence"] == pytest.approx(left["allocation"]["divergence"], rel=1e-5)


@pytest.mark.slow
def test_four_processes_of_which_some_have_no_window(script, tokenizer, tmp_path):
    """Fewer windows than processes to measure on, to hold out, and in a step of the training."""
    model = dense(tmp_path / "dense", tokenizer, "llama", max_position_embeddings=512)
    changes = {"num_samples": 7, "seq_len": 240, "batch_size": 2}
    run_alone(options(model, tmp_path / "1", **changes))
    finish(start(4, script, options(model, tmp_path / "4", **changes)))
    assert_agree(tmp_path / "1", tmp_path / "4", 4, measured=1e-4)  # 3e-4 nats of float32's log-probabilities


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_with_another_number(script, tokenizer, tmp_path):
    """With as many processes as before the result is the same to the byte."""
    model = dense(tmp_path / "dense", tokenizer, "llama", num_hidden_layers=8, intermediate_size=300)
    changes = {"thresholds": {"save_interval_s": 0.0}, "num_samples": 40}
    plain = start(2, script, options(model, tmp_path / "plain", **changes, progress=True))
    lines = len(finish(plain).replace("\r", "\n").splitlines())
    chooser, killed = random.Random(27), 0
    for trial, processes in enumerate([2, 1, 3, 2, 1, 3, 2, 1, 3, 2]):
        output = tmp_path / f"resumed-{trial}"
        process = start(2, script, options(model, output, **changes, progress=True))
        left = chooser.randrange(1, max(lines, 2))
        pieces = iter(lambda process=process: process.stdout.read(1), "")
        for sign in pieces:
            left -= sign in "\r\n"
            if left <= 0:
                break
        kill(process)
        too_late = output.exists()
        killed += not too_late
        finish(start(processes, script, options(model, output, **changes, resume=True)))
        if processes == 2:
            weights = weights_of(tmp_path / "plain"), weights_of(output)
            assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
        else:
            assert_agree(tmp_path / "plain", output, 2 if too_late else processes)
    assert killed >= 8
