"""Recovery in several processes: data in parallel, and the model divided by FSDP2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor import DTensor

import slimgpt
from slimgpt.errors import UsageError
from slimgpt.recovery import train_state
from slimgpt.recovery.sharding import full_tensor, is_sharded, shard, sharded_like
from slimgpt.runtime.distributed import Ranks
from tests.killing import kill
from tests.recovery.conftest import SMALL

STEPS = 6


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, whose divided tensors have all rows."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(model, steps=2):
    """The model and its optimizer after some steps on given tokens."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    ids = torch.arange(24).view(2, 12) % model.config.vocab_size
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return optimizer, schedule


@pytest.mark.parametrize("first", ["divided", "plain"])
@pytest.mark.usefixtures("one_process")
def test_a_state_fits_divided_and_plain_models_alike(first, slim_folder, tmp_path):
    """Two steps, saved, loaded in the other form, two more steps: as four in one form."""

    def model(kind):
        loaded, _ = slimgpt.load(str(slim_folder), dtype="float32")
        if kind == "divided":
            shard(loaded, loaded, torch.device("cpu"), Ranks())
        assert is_sharded(loaded) == (kind == "divided")
        return loaded

    before, after, at_once = (model(kind) for kind in (first, "plain" if first == "divided" else "divided", "plain"))
    optimizer, schedule = trained(before)
    state = train_state.TrainerState(global_step=2)
    train_state.send_state(before, optimizer)
    folder = train_state.write_state(tmp_path, before, optimizer, schedule, state)
    assert load_file(folder / "optimizer.safetensors")["0.exp_avg"].abs().sum() > 0

    optimizer, schedule = trained(after, steps=0)
    train_state.load_weights(folder, after)
    train_state.load_optimizer(folder, optimizer, schedule, 1e-3)
    ids = torch.arange(24).view(2, 12) % after.config.vocab_size
    for _ in range(2):
        after(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    trained(at_once, steps=4)
    for (name, parameter), expected in zip(after.named_parameters(), at_once.parameters(), strict=True):
        torch.testing.assert_close(full_tensor(parameter), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.usefixtures("one_process")
def test_plain_tensors_stay_as_they_are():
    plain = torch.ones(3)
    assert full_tensor(plain) is plain
    assert sharded_like(torch.zeros(3), plain) is plain
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    divided = torch.distributed.tensor.distribute_tensor(torch.zeros(3), mesh)
    assert isinstance(sharded_like(divided, plain), DTensor)


def test_a_process_alone_has_nobody_to_divide_the_model_with(recover):
    with pytest.raises(UsageError, match="torchrun"):
        recover(shard=True)


def test_the_losses_go_to_tensorboard(recover, tmp_path, monkeypatch):
    """Checked with the writer replaced: the package is no dependency of the tests."""
    scalars = []

    class SummaryWriter:
        def __init__(self, folder):
            assert Path(folder) == tmp_path / "runs" / "recovered"

        def add_scalar(self, name, value, step):
            scalars.append((name, step, float(value)))

        def __getattr__(self, name):
            return lambda *_, **__: None

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("slimgpt.recovery.config.find_spec", lambda _: True)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    recovery = recover(report_to="tensorboard")
    held_out = [(step, value) for name, step, value in scalars if name.endswith("held_out_loss")]
    torch.testing.assert_close(torch.tensor(held_out), torch.tensor(recovery.curve.held_out))
    assert len([name for name, *_ in scalars if name == "train/loss"]) == STEPS


@pytest.mark.parametrize(("tracker", "message"), [("mlflow", "choose none"), ("wandb", "pip install wandb")])
def test_an_unknown_or_absent_tracker_is_refused(tracker, message, recover, monkeypatch):
    monkeypatch.setattr("slimgpt.recovery.config.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=message):
        recover(report_to=tracker)


def words(slim, out, text, *more):
    """The command that does what the fixture ``recover`` does."""
    small = ["--max-steps", STEPS, "--max-length", SMALL["max_length"], "--batch-size", SMALL["batch_size"],
             "--micro-batch", 2, "--device", "cpu", "--no-bf16", "--evaluations", SMALL["evaluations"]]  # fmt: skip
    return [str(word) for word in ("recover", slim, out, "--data", text, *small, *more)]


def torchrun(processes):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "slimgpt"]


def run(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


def assert_same(one, two, atol=1e-3):
    one, two = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "distill"])
@pytest.mark.parametrize("divided", [False, True])
def test_two_processes_end_where_one_does(method, divided, recover, slim_folder, dense_folder, text_file, tmp_path):
    """About half a minute each: torchrun with Gloo; sums in another order, so equal only to rounding."""
    teacher = ["--teacher", str(dense_folder)] if method == "distill" else []
    one = recover("one", method=method, micro_batch=2, **({"teacher": teacher[1]} if teacher else {}))
    more = ["--method", method, *teacher, *(["--shard"] if divided else [])]
    run([*torchrun(2), *words(slim_folder, tmp_path / "two", text_file, *more)])
    assert_same(one.folder, tmp_path / "two")
    values = json.loads((tmp_path / "two" / "recovery.json").read_text(encoding="utf-8"))
    assert values["execution"]["processes"] == 2
    assert values["execution"]["sharded"] == divided
    for (_, own), (_, other) in zip(one.curve.held_out, values["curve"]["held_out"], strict=True):
        assert own == pytest.approx(other, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "divided"), [(1, False), (2, False), (4, True)])
def test_a_divided_run_goes_on_with_other_processes(
    processes, divided, recover, slim_folder, dense_folder, text_file, tmp_path
):
    """Killed after the evaluation at half of the steps, with two processes."""
    one = recover("one", method="distill", teacher=str(dense_folder), micro_batch=2)
    out = tmp_path / "out"
    command = words(slim_folder, out, text_file, "--method", "distill", "--teacher", str(dense_folder))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launched = subprocess.Popen([*torchrun(2), *command, "--shard"], env=environment)
    state = tmp_path / ".out.unfinished" / "states" / f"step-{STEPS // 2:08d}"
    while not state.exists() and launched.poll() is None:
        time.sleep(0.01)
    kill(launched)
    assert not out.exists()
    launch = torchrun(processes) if processes > 1 else [sys.executable, "-m", "slimgpt"]
    run([*launch, *command, *(["--shard"] if divided else []), "--resume"])
    assert_same(one.folder, out)
