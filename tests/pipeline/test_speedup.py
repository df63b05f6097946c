"""Runs with a target in speed, by a clock that counts parameters: planned, reported, resumed, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import slimgpt
import slimgpt.evaluation.layer_times as layer_times
import slimgpt.evaluation.reached_speed as reached_speed
from slimgpt.checkpoint.commands import commands
from slimgpt.cli import app
from slimgpt.config import make_config
from slimgpt.errors import CalibrationError, PlanError, UsageError
from slimgpt.evaluation.layer_times import Seconds
from slimgpt.evaluation.speed import Speed
from slimgpt.models.parameter_counts import count, describe
from slimgpt.pipeline.prepare import prepare
from slimgpt.planning.speed_table import SpeedTable, SpeedTarget
from slimgpt.pruning.report import PruneReport
from tests.models.families import tiny_model, windows
from tests.pipeline.folders import OPTIONS, files_of, report_of

TIMED = {"speedup": 1.3, "prompt": 16, "new_tokens": 4}
RUN = {**{name: value for name, value in OPTIONS.items() if name != "ratio"}, **TIMED}


def seconds_of(model) -> float:
    """A microsecond for every parameter of the layers, and a hundredth of a second for the rest."""
    return 1e-2 + 1e-6 * count(model.model.layers)


def plan_command(model: Path, table: Path) -> Result:
    """`slimgpt plan` with the settings of :data:`TIMED`."""
    words = ["--speedup", "1.3", "--prompt", "16", "--new-tokens", "4", "--speed-table", str(table)]
    return CliRunner().invoke(app, ["plan", str(model), *words])


@pytest.fixture
def clock(monkeypatch):
    """Replaces both clocks; gives the numbers of timings of layers and of results."""
    timings = {"layers": 0, "results": 0}

    def of_layers(model, *_):
        timings["layers"] += 1
        return Seconds(seconds_of(model) / 2, seconds_of(model) / 2 / TIMED["new_tokens"])

    def of_results(models, prompt, new_tokens, rounds, progress, batch):
        timings["results"] += 1
        for turn in range(rounds):
            progress(turn + 1, rounds)
        halves = [seconds_of(model) / 2 for model in models]
        return [Speed(batch * prompt / half, batch * new_tokens / half, half) for half in halves]

    monkeypatch.setattr(layer_times, "request_seconds", of_layers)
    monkeypatch.setattr(reached_speed, "measure_speed", of_results)
    return timings


def test_a_model_in_memory_becomes_as_fast_as_promised(clock):
    model, steps = tiny_model("llama"), []
    before = seconds_of(model)
    report = slimgpt.prune(
        model,
        None,
        calibration=windows(40, 32),
        device="cpu",
        on_rehearsed=lambda phase, *step: steps.append((phase, *step)),
        **TIMED,
    )
    speed = report.speed
    assert report.allocation["by"] == "sensitivity"
    assert speed["asked"] == 1.3 <= speed["promised"] < 1.35
    # Both clocks count the same, so the promise is kept to the rounding of widths that were not timed.
    assert speed["reached"] == pytest.approx(speed["promised"], rel=1e-3)
    assert before / seconds_of(model) == pytest.approx(speed["reached"], rel=1e-6)
    assert sum(speed["dense"].values()) / sum(speed["slim"].values()) == pytest.approx(speed["reached"])
    assert {phase for phase, *_ in steps} >= {"timing layers", "timing the result"}
    assert "1.3 times as fast asked" in report.summary()
    assert PruneReport.from_json(json.loads(json.dumps(report.to_json()))).speed == speed
    assert clock["results"] == 1


@pytest.mark.parametrize(
    "more", [{"uniform": True, "allocation": "sensitivity"}, {"allocation": "schedule"}, {"drop_attention": True}]
)
def test_equal_layers_the_schedule_and_layers_without_attention_are_as_fast(clock, more):
    model = tiny_model("llama")
    report = slimgpt.prune(model, None, calibration=windows(40, 32), device="cpu", evaluate=False, **TIMED, **more)
    assert report.speed["promised"] >= 1.3 * (1 - 1e-9)
    assert report.speed["reached"] == pytest.approx(report.speed["promised"], rel=5e-3)
    assert report.plan.uniform == bool(more.get("uniform"))
    assert clock["results"] == 1


def test_a_killed_run_goes_on_with_the_times_it_was_planned_with(clock, wide, text_file, tmp_path):
    options = {**RUN, "calibration": str(text_file)}
    slimgpt.prune_folder(str(wide), tmp_path / "plain", **options)
    timed = clock["layers"]

    class Killed(BaseException):
        pass

    def kill(report, _):
        if report.layer == 2 and not killed:
            killed.append(True)
            raise Killed

    killed: list[bool] = []
    with pytest.raises(Killed):
        slimgpt.prune_folder(str(wide), tmp_path / "slim", on_layer=kill, **options)
    clock["layers"] = 0
    slimgpt.prune_folder(str(wide), tmp_path / "slim", resume=True, **options)
    assert clock["layers"] == 0 < timed
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "slim")
    assert report_of(tmp_path / "plain") == report_of(tmp_path / "slim")
    table = SpeedTable.from_json(json.loads((tmp_path / "slim" / "speed-table.json").read_text()))
    report = PruneReport.from_json(json.loads((tmp_path / "slim" / "slimgpt.json").read_text()))
    assert table.to_json() == report.speed["table"]
    assert report.speed["reached"] >= 1.3 * 0.999
    shape = describe(tiny_model("llama", num_hidden_layers=8, hidden_size=96, intermediate_size=700).config)
    assert SpeedTarget(table, 1.3).promised(shape, report.plan.layers) == report.speed["promised"]
    assert "--speedup 1.3" in commands(report)[0]
    assert "--ratio" not in commands(report)[0]
    # Asked for once more, the finished run is found by its report, and nothing is timed.
    slimgpt.prune_folder(str(wide), tmp_path / "slim", resume=True, **options)
    assert clock["layers"] == 0


def test_a_table_is_measured_once_and_serves_plan_and_prune(clock, dense_folder, text_file, tmp_path):
    file = tmp_path / "times.json"
    given = {**TIMED, "speed_table": str(file)}
    estimate = slimgpt.plan(str(dense_folder), device="cpu", **given)
    timed = clock["layers"]
    assert timed > 0
    assert estimate.speed is not None
    assert estimate.speed["promised"] >= 1.3
    again = slimgpt.plan(str(dense_folder), device="cpu", **given)
    assert again.plan == estimate.plan
    asked = make_config(**{name: value for name, value in {**RUN, **given}.items() if name != "device"})
    prepared = prepare(str(dense_folder), tmp_path / "slim", asked, str(text_file), "cpu")
    assert prepared.plan == estimate.plan
    assert clock["layers"] == timed
    done = plan_command(dense_folder, file)
    assert done.exit_code == 0, done.output
    assert "1.3 times as fast asked" in " ".join(done.output.split())
    assert clock["layers"] == timed
    with pytest.raises(PlanError, match="new_tokens 4, and 8"):
        slimgpt.plan(str(dense_folder), device="cpu", **{**given, "new_tokens": 8})
    with pytest.raises(PlanError, match="removed by 'query'"):
        slimgpt.plan(str(dense_folder), device="cpu", head_unit="kv", **given)


def test_another_engine_needs_a_table_and_is_not_timed(clock, dense_folder, tmp_path):
    with pytest.raises(UsageError, match="only transformers is timed here"):
        slimgpt.plan(str(dense_folder), on="vllm", **TIMED)
    assert clock["layers"] == 0
    estimate = slimgpt.plan(str(dense_folder), device="cpu", **TIMED)
    assert estimate.speed is not None
    file = tmp_path / "vllm.json"
    file.write_text(json.dumps({**estimate.speed["table"], "engine": "vllm"}))
    report = slimgpt.prune(
        tiny_model("llama"), None, calibration=windows(8, 24), device="cpu", evaluate=False, on="vllm",
        speed_table=str(file), **TIMED,
    )  # fmt: skip
    assert report.speed["reached"] is None
    assert report.speed["not_timed"] == "vllm is not timed here"
    assert "not timed" in report.summary()
    assert clock["results"] == 0


def test_several_processes_need_a_table(clock, dense_folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes would time each other"):
        slimgpt.plan(str(dense_folder), device="cpu", **TIMED)
    assert clock["layers"] == 0


@pytest.mark.usefixtures("clock")
def test_a_speed_out_of_reach_is_refused_before_anything_is_written(dense_folder, text_file, tmp_path):
    done = CliRunner().invoke(
        app,
        ["prune", str(dense_folder), str(tmp_path / "slim"), "--speedup", "90", "--prompt", "16", "--new-tokens", "4",
         "--calibration", str(text_file), "--num-samples", "8", "--seq-len", "24", "--device", "cpu"],
    )  # fmt: skip
    assert done.exit_code == 2
    assert "a speedup of 90 cannot be reached: the largest is" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


def test_text_is_checked_before_layers_are_timed(clock, dense_folder, text_file, tmp_path):
    options = {**RUN, "calibration": str(text_file), "seq_len": 10**6}
    with pytest.raises(CalibrationError, match="gives"):
        slimgpt.prune_folder(str(dense_folder), tmp_path / "slim", **options)
    tokenizer = slimgpt.load(str(dense_folder))[1]
    with pytest.raises(CalibrationError, match="gives"):
        slimgpt.prune(tiny_model("llama"), tokenizer, None, str(text_file), seq_len=10**6, device="cpu", **TIMED)
    assert clock["layers"] == 0


def test_a_dry_run_writes_no_table(clock, dense_folder, text_file, tmp_path):
    file = tmp_path / "times.json"
    done = CliRunner().invoke(
        app,
        ["prune", str(dense_folder), str(tmp_path / "slim"), "--speedup", "1.2", "--prompt", "16", "--new-tokens", "4",
         "--calibration", str(text_file), "--device", "cpu", "--num-samples", "8", "--seq-len", "24",
         "--speed-table", str(file), "--dry-run"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert clock["layers"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("clock")
def test_a_table_of_another_machine_is_told(dense_folder, tmp_path):
    file = tmp_path / "times.json"
    given = {**TIMED, "speed_table": str(file)}
    own = slimgpt.plan(str(dense_folder), device="cpu", **given)
    assert "note" not in own.speed
    table = json.loads(file.read_text())
    assert {"device", "processor", "dtype", "threads"} <= set(table["machine"])
    threads = table["machine"]["threads"]
    file.write_text(json.dumps({**table, "machine": {**table["machine"], "threads": threads + 7, "dtype": "bfloat16"}}))
    other = slimgpt.plan(str(dense_folder), device="cpu", **given)
    assert other.plan == own.plan
    assert other.speed["note"].endswith(
        f"measured elsewhere: dtype bfloat16 there, float32 here; threads {threads + 7} there, {threads} here"
    )
    done = plan_command(dense_folder, file)
    assert "measured elsewhere: dtype bfloat16 there" in " ".join(done.output.split())
    file.write_text(json.dumps({**table, "model": {**table["model"], "vocab_size": 7}}))
    with pytest.raises(PlanError, match="vocab_size 7"):
        slimgpt.plan(str(dense_folder), device="cpu", **given)


@pytest.mark.usefixtures("clock")
def test_the_command_says_what_was_promised_and_reached(dense_folder, text_file, tmp_path):
    done = CliRunner().invoke(
        app,
        ["prune", str(dense_folder), str(tmp_path / "slim"), "--speedup", "1.2", "--prompt", "16", "--new-tokens", "4",
         "--calibration", str(text_file), "--device", "cpu", "--num-samples", "8", "--seq-len", "24", "--no-evaluate"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    output = " ".join(done.output.split())
    assert "(asked: 1.2 times as fast)" in output
    assert "speed: 1.2 times as fast asked, 1.2" in output
    assert "reached (transformers, batch 1, 16 + 4 tokens)" in output
    assert (tmp_path / "slim" / "speed-table.json").is_file()
    # It is a model folder of ours, so another run may replace it.
    done = CliRunner().invoke(
        app,
        ["prune", str(dense_folder), str(tmp_path / "slim"), "--ratio", "0.2", "--overwrite", "--calibration",
         str(text_file), "--device", "cpu", "--num-samples", "8", "--seq-len", "24", "--no-evaluate"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "slim" / "speed-table.json").exists()


def test_the_real_clocks_time_a_model():
    model = tiny_model("llama")
    shape = describe(model.config, model)
    table = layer_times.measure_table(
        model.config, shape, "query", 1, batch=2, prompt=8, new_tokens=3, device=torch.device("cpu"),
        dtype=torch.float32, rounds=1,
    )  # fmt: skip
    assert table.model_seconds([layer.sizes for layer in shape.layers]) > 0
    sizes = [layer.sizes for layer in shape.layers]
    report = reached_speed.reached_speed(
        model.config, sizes, sizes, batch=2, prompt=8, new_tokens=3, device=torch.device("cpu"),
        dtype=torch.float32, parameters=2 * shape.parameters, rounds=1,
    )  # fmt: skip
    assert report["reached"] > 0
    assert min(*report["dense"].values(), *report["slim"].values()) > 0
