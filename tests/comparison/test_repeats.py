"""Several seeds and several prunings in one column: means, deviations and errors against closed forms."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import statistics
import sys
from typing import Any

import pytest

import slimgpt
from slimgpt.checkpoint.updating import update_card
from slimgpt.comparison import CompareConfig, Comparison, ModelResult
from slimgpt.comparison.columns import columns
from slimgpt.comparison.differences import pairs_of, tasks_difference_over
from slimgpt.comparison.plots import figures
from slimgpt.comparison.spread import spread_of
from slimgpt.errors import UsageError
from slimgpt.evaluation.tasks import TaskScores, answers
from tests.cli.test_command_line import run
from tests.comparison.test_comparison import Counted, folders  # noqa: F401  (a fixture)
from tests.evaluation.conftest import ROWS, data_dir  # noqa: F401  (a fixture)


def side(folder: str, seed: int | None, scores: dict[int, float], **other: Any) -> ModelResult:
    """A run with the scores of some questions of one task."""
    samples = {"piqa": [{"doc_id": number, "acc": score, "filter": "none"} for number, score in scores.items()]}
    mean = statistics.fmean(scores.values())
    error = statistics.stdev(scores.values()) / math.sqrt(len(scores))
    tasks = TaskScores({"piqa": {"acc": mean, "acc_stderr": error}}, mean, mean, error, {"tasks": ["piqa"]}, samples)
    return ModelResult("slim", 100, None, tasks=tasks, folder=folder, seed=seed, **other)


def test_a_spread_is_mean_and_deviation_beside_the_error_of_one():
    spread = spread_of([1.0, 2.0, 6.0], [0.1, 0.2, 0.3])
    assert spread is not None
    assert (spread.mean, spread.deviation) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))
    assert (spread.stderr, spread.runs) == (pytest.approx(0.2), 3)
    alone = spread_of([0.1], [None])
    assert alone is not None
    assert (alone.mean, alone.deviation, alone.stderr) == (0.1, 0.0, None)
    assert spread_of([1.0, None], [None, None]) is None


def test_other_rows_count_as_more_rows():
    """Seeds that ask different questions: the error is that of all of them."""
    first, second = {0: 1.0, 1: 0.0, 2: 1.0}, {5: 0.0, 6: 1.0, 7: 1.0}
    base = side("dense", 0, first, repeats=[side("dense", 1, second)])
    worse = side("slim", 0, {0: 0.0, 1: 0.0, 2: 1.0}, repeats=[side("slim", 1, {5: 0.0, 6: 0.0, 7: 0.0})])
    apart = tasks_difference_over(pairs_of(base, worse), "piqa")
    changes = [-1.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    assert apart is not None
    assert apart.value == pytest.approx(statistics.fmean(changes))
    assert apart.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(6))
    assert apart.count == 6


def test_the_same_rows_again_do_not():
    """Two seeds with the same questions, as of other examples before them: a question is its mean difference."""
    questions = range(4)
    base = side("dense", 0, dict.fromkeys(questions, 1.0), repeats=[side("dense", 1, dict.fromkeys(questions, 1.0))])
    runs = [{0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}, {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}]
    slim = side("slim", 0, runs[0], repeats=[side("slim", 1, runs[1])])
    apart = tasks_difference_over(pairs_of(base, slim), "piqa")
    changes = [statistics.fmean(of_run[number] - 1.0 for of_run in runs) for number in questions]
    assert apart is not None
    assert apart.value == pytest.approx(statistics.fmean(changes))
    assert apart.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(4))
    assert apart.count == 4


def test_several_prunings_add_how_far_they_are_from_each_other():
    questions = range(4)
    base = side("dense", None, dict.fromkeys(questions, 1.0))
    runs = [{0: 1.0, 1: 0.0, 2: 1.0, 3: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0}]
    slim = side("slim-0", None, runs[0], repeats=[side("slim-1", None, runs[1])])
    apart = tasks_difference_over(pairs_of(base, slim), "piqa")
    changes = [statistics.fmean(of_run[number] - 1.0 for of_run in runs) for number in questions]
    within = statistics.stdev(changes) / math.sqrt(4)
    between = statistics.stdev([-0.25, -0.75]) / math.sqrt(2)
    assert apart is not None
    assert (apart.value, apart.stderr) == (pytest.approx(-0.5), pytest.approx(math.hypot(within, between)))


def test_columns_are_models_or_named_lists(tmp_path, monkeypatch):
    for name in ("dense", "slim-0", "slim-1", "a=b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    three = columns("dense", ["seeds=slim-0,slim-1", "a=b", "one=slim-1"])
    assert [(column.label, column.models) for column in three] == [
        ("dense", ("dense",)),
        ("seeds", ("slim-0", "slim-1")),
        ("a=b", ("a=b",)),
        ("one", ("slim-1",)),
    ]
    assert three[1].labels == ("slim-0", "slim-1")
    for slim, message in (
        (["x=slim-0,"], "names no model"),
        (["=slim-0"], "names no model"),
        (["x=slim-0,slim-0"], "names a model twice"),
        (["x=slim-0", "x=slim-1"], "two columns are called 'x'"),
    ):
        with pytest.raises(UsageError, match=message):
            columns("dense", slim)
    with pytest.raises(UsageError, match="the base is one"):
        columns("x=slim-0,slim-1", ["dense"])


@pytest.fixture(scope="module")
def compared(folders, text_file, data_dir, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("compared") / "out"
    both = f"both={folders / 'slim-20'},{folders / 'slim-50'}"
    done = run(
        "compare", folders / "dense", both, "--out", out, "--text", text_file, "--window", 32, "--max-tokens", 256,
        "--tasks", "piqa,boolq", "--limit", 2, "--data-dir", data_dir, "--passkey", 100, "--seeds", 2, "--no-speed",
        "--device", "cpu", "--samples", 1,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return json.loads((out / "compare.json").read_text()), (out / "report.html").read_text(), done.output


def test_a_column_is_the_mean_over_seeds_and_prunings(compared, folders, text_file, data_dir):  # noqa: F811
    values, page, printed = compared
    dense, both = values["models"]
    runs = [both, *both["repeats"]]
    assert [(one["folder"], one["seed"]) for one in runs] == [
        *itertools.product(("slim-20", "slim-50"), (0, 1)),
    ]
    perplexities, kls, scores = [], [], []
    for one in runs:
        model, tokenizer = slimgpt.load(str(folders / one["folder"]))
        measured = slimgpt.evaluate(
            model,
            tokenizer,
            str(text_file),
            window=32,
            max_tokens=256,
            seed=one["seed"],
            against=str(folders / "dense"),
        )
        perplexities.append(measured.perplexity)
        assert measured.divergence is not None
        kls.append(measured.divergence.kl.mean)
        assert one["perplexities"][0]["perplexity"] == pytest.approx(measured.perplexity, rel=1e-6)
        assert one["perplexities"][0]["divergence"]["kl"]["mean"] == pytest.approx(
            measured.divergence.kl.mean, rel=1e-5
        )
        tasks = slimgpt.evaluate_tasks(
            model, tokenizer, "piqa,boolq", 2, data_dir=data_dir, seed=one["seed"], draw_rows=True
        )
        assert one["tasks"]["mean"] == tasks.mean
        scores.append(tasks)
    row = f"{statistics.fmean(perplexities):,.2f}"
    assert row in page
    assert f"SD of 4 {statistics.stdev(perplexities):.2g}, SE of one" in page
    assert f"{statistics.fmean(kls):.4f}" in page
    assert f"SD of 4 {statistics.stdev(kls):.2g}, SE of one" in page
    assert "SD of" in printed
    means = [tasks.mean for tasks in scores]
    assert both["recovery"]["mean"]["recovery"] == pytest.approx(
        statistics.fmean(means) / statistics.fmean(one["tasks"]["mean"] for one in (dense, *dense["repeats"]))
    )
    # The same rows of a seed for all models; boolq has three of which two are asked.
    assert answers(scores[0])["boolq"].keys() == answers(scores[2])["boolq"].keys()
    assert len(both["commands"]) == 2
    assert [len(one["samples"]) for one in runs] == [1, 0, 0, 0]


def test_the_protocol_says_what_a_seed_changes(compared):
    values, page, _ = compared
    assert "measured 2 times, with seeds 0 to 1" in page
    starts = [one["perplexities"][0]["protocol"]["skipped_tokens"] for one in values["models"][0]["repeats"]]
    first = values["models"][0]["perplexities"][0]["protocol"]["skipped_tokens"]
    assert f"window 32: {first}, {starts[0]}" in page
    assert "of these tasks the rows that are asked" in page
    assert "the numbers of the pass key" in page
    assert "both is 2 models, slim-20, slim-50" in page
    assert "the drawn 2 rows of each" in page


def test_what_no_seed_changes_is_measured_once(folders, text_file, data_dir, tmp_path, monkeypatch):  # noqa: F811
    module = sys.modules["slimgpt.comparison.measure"]
    tasks, texts = Counted(module.evaluate_tasks), Counted(module.evaluate)
    monkeypatch.setattr(module, "evaluate_tasks", tasks)
    monkeypatch.setattr(module, "evaluate", texts)
    words = ["compare", folders / "dense", folders / "slim-50", "--text", text_file, "--window", 32, "--no-speed",
             "--max-tokens", 128, "--tasks", "boolq", "--data-dir", data_dir, "--device", "cpu",
             "--samples", 0]  # fmt: skip
    done = run(*words, "--out", tmp_path / "out", "--seeds", 3)
    assert done.exit_code == 0, done.output
    assert (tasks.calls, texts.calls) == (2, 6)
    assert "of these tasks nothing, so that they were asked once" in (tmp_path / "out/report.html").read_text()
    for options, message in ((["--seeds", 0], "seeds is 0"), (["--seeds", 2, "--update-card"], "leave out one of")):
        refused = run(*words, "--out", tmp_path / "x", *options)
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())


def test_bars_of_several_runs_have_their_deviation():
    base = side("dense", 0, {0: 1.0, 1: 1.0}, repeats=[side("dense", 1, {0: 1.0, 1: 0.0})])
    comparison = Comparison((base, base), None, CompareConfig(seeds=2))
    (axis,) = next(figure for figure in figures(comparison) if "deviation" in figure.axes[0].get_ylabel()).axes
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([75.0, 75.0])
    segments = axis.collections[0].get_segments()
    assert segments[0][1][1] - segments[0][0][1] == pytest.approx(2 * 100 * statistics.stdev([1.0, 0.5]))


def test_figures_of_a_comparison_go_to_the_cards(folders, text_file, data_dir, tmp_path):  # noqa: F811

    slim = shutil.copytree(folders / "slim-50", tmp_path / "slim")
    done = run(
        "compare", folders / "dense", slim, "--text", text_file, "--window", 32, "--max-tokens", 128, "--tasks",
        "boolq", "--data-dir", data_dir, "--device", "cpu", "--samples", 0, "--no-speed", "--update-card",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "updated the card and the report in" in done.output
    models = json.loads((tmp_path / "out/compare.json").read_text())["models"]
    measured = models[1]
    before, after = (model["perplexities"][0]["perplexity"] for model in models)
    page = (tmp_path / "out/report.html").read_text()
    assert f"of the parameters, perplexity {before:.2f} → {after:.2f} on {text_file.name}." in page  # without a speed
    text, task = json.loads((slim / "slimgpt.json").read_text())["evaluation"]["results"]
    assert text["perplexity"] == measured["perplexities"][0]["perplexity"]
    assert text["kl_divergence"] == measured["perplexities"][0]["divergence"]["kl"]["mean"]
    assert (task["task"], task["value"]) == ("boolq", measured["tasks"]["scores"]["boolq"]["acc"])
    assert task["rows"] == len(ROWS["boolq/validation"])
    card = (slim / "README.md").read_text()
    assert f"perplexity {text['perplexity']:.2f}" in card
    assert "model-index" in card
    assert str(tmp_path) not in card
    assert not (folders / "dense" / "slimgpt.json").exists()
    endings = {"answers": 8, "loops": 0.5, "unstopped": 0.25, "either": 0.625}
    update_card(slim, [{**task, "task": "gsm8k", "metric": "exact_match", "endings": endings}])
    assert "62.5% of the answers loop or never stop" in (slim / "README.md").read_text()


def test_a_comparison_without_a_slim_folder_has_no_card_to_update(folders, text_file, tmp_path):  # noqa: F811
    dense = folders / "dense"
    done = run(
        "compare", dense, dense, "--text", text_file, "--window", 32, "--no-speed", "--update-card", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 2
    assert "none of the models to compare is a folder that slimgpt wrote" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
