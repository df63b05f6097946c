"""The whole script on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quality_table.report
import quality_table.run
import typer
from quality import main
from quality_table.ablations import NUM_SAMPLES, SEQ_LENS, ablation_rows
from quality_table.rows import Row, Store
from quality_table.run import Bench, Settings
from typer.testing import CliRunner, Result

from slimgpt.planning.schedules import RATIOS
from tests.benchmarks.test_quality_table import TINY


@pytest.fixture
def run(data_folder, dense_folder, tmp_path, monkeypatch):
    """The command with a tiny model, tiny windows and what else is asked for."""
    for module in (quality_table.run, quality_table.report):
        monkeypatch.setattr(module, "TEXTS", TINY)
    app = typer.Typer()
    app.command()(main)

    def command(*arguments: str, data: Path = data_folder) -> Result:
        usual = ["--data", data, "--keep", tmp_path / "rows", "--models", "gemma3", "--gemma", dense_folder]
        usual += ["--num-samples", 6, "--seq-len", 16, "--max-tokens", 160, "--ratios", "0.3"]
        return CliRunner().invoke(app, [*map(str, usual), *arguments])

    return command


def test_one_command_gives_page_json_and_plots_and_a_second_one_measures_nothing(run, tmp_path, monkeypatch):
    out = tmp_path / "benchmarks/results/quality"
    first = run("--methods", "paper,flap,shortgpt", "--out", str(out))
    assert first.exit_code == 0, first.output
    page, content = out.with_suffix(".md").read_text(), json.loads(out.with_suffix(".json").read_text())
    assert [row["row"]["method"] for row in content["rows"]] == ["dense", "paper", "flap", "flap", "shortgpt"]
    by_title = {line.split(" | ")[1]: line for line in page.splitlines() if line.startswith("| ")}
    assert set(by_title) == {"method", "dense", "paper", "flap", "shortgpt"}
    assert "25.00% (!)" in by_title["shortgpt"]  # one layer of four
    assert out.with_name("quality-ratio.png").is_file()
    assert out.with_name("quality-seconds.png").is_file()

    monkeypatch.setattr(Bench, "_slim", None)  # calling it would fail
    assert run("--methods", "paper,flap,shortgpt", "--out", str(out)).exit_code == 0
    assert json.loads(out.with_suffix(".json").read_text()) == content


@pytest.mark.parametrize("anew", [(), ("--anew",)])
def test_processes_with_one_folder_divide_the_rows(run, monkeypatch, anew):
    """The second command is given while the first one is at its first row."""
    if anew:
        assert run("--methods", "paper").exit_code == 0
    begun: list[str] = []
    slim = Bench._slim

    def begin(self, row):
        begun.append(row.name)
        if len(begun) == 1:
            second = run("--methods", "paper", *anew)
            assert second.exit_code == 0, second.output
            assert begun == ["gemma3/dense/0.00", "gemma3/paper/0.30"]
        return slim(self, row)

    monkeypatch.setattr(Bench, "_slim", begin)
    first = run("--methods", "paper,wanda", "--rows", "*paper*", "--rows", "*dense*", *anew)
    assert first.exit_code == 0, first.output
    assert len(begun) == 2, "what the other has done is not done again"


HOLDS = """
import sys, time
from pathlib import Path
from quality_table.rows import Row, Store
with Store(Path(sys.argv[1])).claim(Row("gemma3", "paper", 0.3), {}) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_was_at_is_free_again(tmp_path):
    store, row = Store(tmp_path), Row("gemma3", "paper", 0.3)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline().strip() == b"True"
        with store.claim(row, {}) as mine, store.claim(row, {"dtype": "bfloat16"}) as other:
            assert (mine, other) == (False, True)
    finally:
        process.kill()
        process.wait()
    with store.claim(row, {}) as mine:
        assert mine


def test_single_rows_can_be_chosen_and_changed(run, tmp_path):
    result = run("--rows", "*/slimgpt*", "--set", "damping=0.1", "--methods", "slimgpt,wanda")
    assert result.exit_code == 0, result.output
    (file,) = (tmp_path / "rows").glob("*.json")
    assert json.loads(file.read_text())["row"]["changes"] == [["damping", 0.1]]
    listed = run("--list", "--set", "damping=0.1", "--methods", "paper,slimgpt,wanda").output
    states = {line.split()[0]: line.split()[1] for line in listed.splitlines() if line.startswith("gemma3")}
    assert states["gemma3/slimgpt[damping=0.1]/0.30"] == "done"
    assert states["gemma3/wanda/0.30"] == "to"
    assert states["gemma3/paper/0.30"] == "to"


def test_a_kept_model_is_measured_again_without_pruning_it_again(run, tmp_path, monkeypatch):
    def values() -> dict[str, float]:
        (file,) = (tmp_path / "rows").glob("*.json")
        return {name: measure["value"] for name, measure in json.loads(file.read_text())["measures"].items()}

    chosen = ("--methods", "paper", "--rows", "gemma3/paper*", "--keep-models")
    assert run(*chosen).exit_code == 0
    first = values()
    (folder,) = (path for path in (tmp_path / "rows").glob("gemma3*") if path.is_dir())
    assert (folder / "config.json").is_file()
    monkeypatch.setattr(Bench, "_slim", None)  # calling it would fail
    assert run(*chosen, "--max-tokens", "80").exit_code == 0
    assert run(*chosen).exit_code == 0
    assert values() == first
    assert len(first) == len(TINY)


def test_a_row_that_fails_is_named_and_the_others_go_on(run, tmp_path):
    result = run("--methods", "slimgpt,magnitude", "--set", "num_samples=99999", "--rows", "0.30")
    assert result.exit_code == 1
    assert "slimgpt" in result.output
    assert "lower --num-samples" in " ".join(result.output.split())
    assert [file.name[:16] for file in (tmp_path / "rows").glob("*magnitude-0.30*")] == ["gemma3-magnitude"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "nothing"), "method 'nothing' is unknown"),
        (("--set", "damping"), "is no name=value"),
        (("--source", "books"), "calibration source 'books' is unknown"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_long(run, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())


def test_missing_texts_are_refused_with_the_folder_that_was_given(run, tmp_path):
    result = run(data=tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "--data" in result.output


def test_the_papers_ablations_are_all_there_each_once():
    rows = list(ablation_rows(["smollm2"], 0.2, Settings(num_samples=128, seq_len=512)))
    titles = [row.title for row in rows]
    assert len(set(titles)) == len(titles)
    assert {"paper", "slimgpt", "paper-no-gcd", "paper-no-dgs"} < set(titles)
    for method in ("paper", "slimgpt"):
        assert {f"{method}[num_samples={n}]" for n in NUM_SAMPLES if n != 128} < set(titles)
        assert {f"{method}[seq_len={n}]" for n in SEQ_LENS if n != 512} < set(titles)
        assert {f"{method}[source={name}]" for name in ("alpaca", "wikitext2", "auto")} < set(titles)
    assert {f"paper[schedule={name}]" for name in RATIOS if name != "log_increase"} < set(titles)
