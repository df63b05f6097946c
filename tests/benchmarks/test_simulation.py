"""The simulation of a run on tensors without storage, beside real runs of several processes."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.simulation import STAGES, Counts, MetaRun, counted, make_job, run, simulate
from slimgpt.config import make_config
from slimgpt.distillation.trainer import Distillation
from slimgpt.runtime.distributed import Ranks, join
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import VOCABULARY, tiny_model
from tests.pipeline.test_ranks import finish, start

ROOT = Path(__file__).resolve().parents[2]

REAL = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from tests.benchmarks.test_simulation import real_run
real_run(*sys.argv[1:])
"""

HELD_OUT = 3
TINY = {"attn_implementation": "sdpa", "num_hidden_layers": 2}
SETTINGS = {
    "ratio": 0.3, "num_samples": 26, "seq_len": 48, "batch_size": 3, "forward_dtype": "float32",
    "allocation": "sensitivity", "distill": 500, "whole_experts": 0,
}  # fmt: skip


def settings():
    return make_config(**SETTINGS)


def windows():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (SETTINGS["num_samples"], SETTINGS["seq_len"]), generator=generator)


def real_run(family: str, folder: str) -> None:
    """One of several processes: the run, and its messages in a file."""
    model, counts = tiny_model(family, **TINY), Counts()
    with join(torch.device("cpu")) as ranks:
        job = make_job(model, settings(), windows(), HELD_OUT)
        with counted(counts):
            report, _ = run(model, job, ranks, counts, job.plan)
        assert report.distillation["steps"]
    messages = [asdict(message) for message in counts.messages]
    (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(messages), encoding="utf-8")


def simulated(family: str, rank: int, world: int) -> Counts:
    model = tiny_model(family, **TINY)
    plan = make_job(model, settings(), windows(), HELD_OUT).plan
    ranks = Ranks(rank, world)
    return simulate(model.config, settings(), windows(), ranks, torch.float32, held_out=HELD_OUT, plan=plan)


@pytest.mark.slow
def test_a_simulated_run_counts_operations_messages_and_bytes():
    """Without others there are no messages; two processes each have half of the forward passes of the loop, and rank 0
    alone solves."""
    alone, (first, second) = simulated("llama", 0, 1), (simulated("llama", rank, 2) for rank in range(2))
    assert not alone.messages
    assert {message.kind for message in first.messages} >= {"reduce", "broadcast", "all_reduce", "reduce_scatter"}
    trained = [each.bytes_of("teacher") + each.bytes_of("training") for each in (first, second)]
    assert trained[0] == trained[1] > 0
    for part in ("forward", "gram"):
        halves = [each.operations["loop", part] for each in (first, second)]
        assert sum(halves) == alone.operations["loop", part]
    assert first.operations["loop", "solver"] == alone.operations["loop", "solver"] > 0
    assert second.operations["loop", "solver"] == 0
    assert all(alone.peak[stage] > 0 for stage in STAGES)


@pytest.mark.parametrize("allocation", ["schedule", pytest.param("search", marks=pytest.mark.slow)])
def test_a_step_of_the_training_waits_for_no_number(allocation, monkeypatch):
    """The losses are read once a step, after it; the steps of a search begin with generated text."""
    model, inside, steps = tiny_model("llama", **TINY), [], []
    few = {"distill": 150, "evaluate": False} if allocation == "schedule" else {"distill": 1500}
    config = make_config(**{**SETTINGS, "allocation": allocation, **few})
    text = windows()[:8] if allocation == "schedule" else windows()
    plan = make_job(model, config, text).plan
    real = Distillation.step

    def step(self, *args):
        waits = MetaRun.current.counts.waits
        before = waits["training"]
        results = real(self, *args)
        inside.append(waits["training"] - before)
        steps.append(waits["training"])
        return results

    monkeypatch.setattr(Distillation, "step", step)
    with other_thresholds(step_tokens=48):
        simulate(model.config, config, text, Ranks(), torch.float32, plan=plan)
    assert len(inside) > 2
    assert set(inside) == {0}
    assert {after - before for before, after in pairwise(steps)} == {2}  # the losses, and whether all is finite


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_its_messages_are_those_of_real_processes(family, world, tmp_path):
    """Kind, bytes and stage of every message of every process, in their order."""
    script = tmp_path / "real.py"
    script.write_text(REAL, encoding="utf-8")
    finish(start(world, script, ROOT, family, tmp_path))
    for rank in range(world):
        real = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        own = [asdict(message) for message in simulated(family, rank, world).messages]
        assert len(real) > 50
        assert own == real
