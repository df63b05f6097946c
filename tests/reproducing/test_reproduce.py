"""The recipes of the paper's tables: all are sound, and the smallest is worked through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimgpt.cli import app
from slimgpt.errors import UsageError
from slimgpt.reproducing import read_recipe, reproduce
from slimgpt.reproducing.result import Result
from slimgpt.reproducing.run import RECIPES, _check, slug
from slimgpt.reproducing.table import cells

FILES = sorted(RECIPES.glob("*.toml"))
NAMES = [file.stem for file in FILES]


def test_there_is_a_recipe_for_every_table():
    models = {"llama-7b", "llama-13b", "llama-30b", "vicuna-7b", "llama2-7b", "baichuan-7b", "mistral-7b-instruct"}
    ablations = {"solver", "ratio-strategy", "calibration-set", "samples-and-length"}
    rest = {"pruning-cost", "latency-and-memory", "mmlu", "longbench"}
    assert set(NAMES) == models | {f"ablation-{name}" for name in ablations} | rest


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_recipe_is_sound(file, dense_folder):
    """Every key is known, and every option is one that pruning and training take; on a stand-in for the model."""
    for tiny in (False, True):
        recipe = read_recipe(file, str(dense_folder), tiny)
        _check(recipe)
        assert len({slug(row.name) for row in recipe.rows}) == len(recipe.rows)
    assert all(row.model == "demo" for row in read_recipe(file, tiny=True).rows)
    assert not any(row.paper for row in read_recipe(file, tiny=True).rows)


def test_models_are_pruned_at_the_papers_ratios():
    for name in ("llama-7b", "llama-13b", "llama-30b"):
        ratios = [row.prune["ratio"] for row in read_recipe(RECIPES / f"{name}.toml").rows if row.prune]
        assert ratios == [0.2, 0.25, 0.33, 0.5]
    dense = read_recipe(RECIPES / "llama-7b.toml").rows[0]
    assert (dense.prune, dense.recover, dense.paper) == (None, None, {"wikitext2 perplexity @128": 12.63})


TINY = """
title = "A table"
model = "somewhere/far-away"
prune = {{ method = "paper", calibration = "{text}", num_samples = 4, seq_len = 24 }}
recover = {{ data = "{text}", max_steps = 4, batch_size = 2, micro_batch = 2, max_length = 24, learning_rate = 5e-3 }}
[evaluation]
measure = ["perplexity", "cost"]
texts = ["{text}"]
windows = [24]
max_tokens = 480
[[rows]]
name = "dense"
prune = false
paper = {{ "text.txt perplexity @24" = 12.5 }}
[[rows]]
name = "30%"
prune = {{ ratio = 0.3 }}
paper = {{ "text.txt perplexity @24" = 14.5, "text.txt perplexity @24, tuned" = 13.5 }}
"""


@pytest.fixture
def recipe(tmp_path, text_file):
    file = tmp_path / "small.toml"
    file.write_text(TINY.format(text=text_file))
    return file


def test_a_recipe_ends_in_a_table_beside_the_papers_column(recipe, dense_folder, tmp_path):
    words = ["reproduce", recipe, "--out", tmp_path / "out", "--model", dense_folder, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "out" / "small.json").read_text())
    names = [row["name"] for row in values["results"]]
    assert names == ["dense", "30%", "30%, tuned"]
    dense, slim, tuned = (row["figures"] for row in values["results"])
    assert slim["parameters"] == tuned["parameters"] < dense["parameters"]
    assert slim["removed, %"] == pytest.approx(30, abs=1)
    assert slim["pruning, s"] > 0
    assert "pruning, s" not in tuned
    assert slim["text.txt perplexity @24"] != tuned["text.txt perplexity @24"]
    assert [row["paper"].get("text.txt perplexity @24") for row in values["results"]] == [12.5, 14.5, 13.5]
    lines = (tmp_path / "out" / "small.md").read_text().splitlines()
    assert lines[0] == "# A table"
    assert "text.txt perplexity @24 | paper |" in lines[4]
    assert lines[6].startswith("| dense |")
    assert "12.5" in lines[6]
    assert not (tmp_path / "out" / "small" / "models").exists()


def test_finished_rows_are_kept(recipe, dense_folder, tmp_path):
    def go(**more):
        done = []
        arguments = {"model": str(dense_folder), "device": "cpu", "on_row": lambda *row: done.append(row[2]), **more}
        results = reproduce(recipe, tmp_path / "out", **arguments)[1]
        return done, [result.figures for result in results]

    def stop(number, total, text):  # noqa: ARG001
        if text == "30%: training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(on_row=stop)
    assert len(json.loads((tmp_path / "out" / "small.json").read_text())["results"]) == 1
    done, figures = go()
    assert done[0] == "30%: pruning"
    assert go() == ([], figures)
    recipe.write_text(recipe.read_text().replace("max_tokens = 480", "max_tokens = 240"))
    assert go()[0][0] == "dense: measuring"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("title", "titel", "unknown key 'titel'"),
        ("ratio = 0.3", "rato = 0.3", "unknown key 'rato'"),
        ("ratio = 0.3", "ratio = 0.3, damping = -1.0", "must be 0 or more"),
        ('method = "paper"', 'method = "best"', "method 'best' is unknown"),
        ("max_steps = 4", "max_steps = 0", "max_steps is 0"),
        ('"cost"', '"costs"', "measure 'costs' is unknown"),
        ('name = "30%"', 'name = "dense"', "two rows of the same name"),
        ("[evaluation]", "[evaluation", "cannot read the recipe"),
    ],
)
def test_a_bad_recipe_is_refused_before_any_row(before, after, message, recipe, dense_folder, tmp_path):
    recipe.write_text(recipe.read_text().replace(before, after, 1))
    with pytest.raises(UsageError, match=message):
        reproduce(recipe, tmp_path / "out", model=str(dense_folder), device="cpu")
    assert not (tmp_path / "out").exists()


def test_an_unknown_recipe_lists_the_others(tmp_path):
    with pytest.raises(UsageError, match=r"there are .*ablation-solver.*llama-7b"):
        reproduce("gpt-5", tmp_path)


def test_columns_without_a_stated_figure_have_no_paper_column():
    results = [Result("a", {"x": 1.0, "y": 12345.0}, {"x": 2.0}, {}), Result("b", {"y": 0.12345}, {}, {})]
    assert cells(results) == (["row", "x", "paper", "y"], [["a", "1", "2", "12,345"], ["b", "", "", "0.1235"]])


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_every_tiny_variant_runs_on_the_demo_model(file: Path, tmp_path):
    """One to seven minutes each on one core."""
    _, results = reproduce(file, tmp_path, tiny=True, device="cpu")
    assert all(result.figures for result in results)
