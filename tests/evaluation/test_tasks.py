"""Scores of tasks from local files against plain lm-evaluation-harness on the same rows."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from pathlib import Path
from unittest import mock

import datasets
import lm_eval
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slimgpt.errors import UsageError
from slimgpt.evaluation import harness_tasks
from slimgpt.evaluation.harness import run_harness
from slimgpt.evaluation.harness_tasks import FOLDERS, task_manager
from slimgpt.evaluation.tasks import (
    COMMONSENSE,
    MIN_QUESTIONS,
    TaskScores,
    _majority_answer,
    answers,
    difference,
    evaluate_tasks,
    flips,
    stderr_of_mean,
)
from slimgpt.runtime.thresholds import other_thresholds
from tests.cli.test_command_line import run
from tests.models.families import tiny_model

SPLIT = {name: "test" if name.startswith(("arc", "open")) else "validation" for name in COMMONSENSE}


HUB = {
    "aps/super_glue": "boolq",
    "baber/piqa": "piqa",
    "Rowan/hellaswag": "hellaswag",
    "allenai/winogrande": "winogrande",
    "allenai/ai2_arc": {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"},
    "allenai/openbookqa": "openbookqa",
}
"""Where the harness's tasks look for their rows."""


ROOT = Path(lm_eval.__file__).parent / "tasks"


def plain_harness(model, tokenizer, data_dir, limit):
    """The harness as it is, its own tasks and its own model class; only what comes from the hub is local."""

    def load_dataset(path, name=None, **_):
        task = HUB[path] if isinstance(HUB[path], str) else HUB[path][name]
        rows = [json.loads(line) for line in (data_dir / task / f"{SPLIT[task]}.jsonl").read_text().splitlines()]
        if task == "boolq":
            rows = [{**row, "label": int(row["answer"])} for row in rows]
        split = datasets.Dataset.from_list(rows[:limit])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), split))

    manager = TaskManager(include_defaults=False, include_path=[ROOT / FOLDERS[name] for name in COMMONSENSE])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with mock.patch("datasets.load_dataset", load_dataset):
        return lm_eval.simple_evaluate(model=lm, tasks=list(COMMONSENSE), task_manager=manager)


def assert_equal_question_by_question(model, tokenizer, data_dir, limit):
    expected = plain_harness(model, tokenizer, data_dir, limit)
    measured = evaluate_tasks(model, tokenizer, "commonsense", limit=limit, data_dir=data_dir)
    for task in COMMONSENSE:
        assert len(measured.samples[task]) == len(expected["samples"][task]) <= limit
        for ours, theirs in zip(measured.samples[task], expected["samples"][task]):
            assert ours["arguments"] == theirs["arguments"]
            assert ours["target"] == theirs["target"]
            for (a,), (b,) in zip(ours["resps"], theirs["resps"]):
                assert a[0] == pytest.approx(b[0], abs=2e-3)
                assert a[1] == b[1]
            for metric in ours["metrics"]:
                assert ours[metric] == theirs[metric]
        for metric in ("acc", "acc_norm"):
            assert measured.scores[task].get(metric) == expected["results"][task].get(f"{metric},none")
    return measured


def test_seven_tasks_equal_the_plain_harness(tokenizer, data_dir):
    model = tiny_model("llama", max_position_embeddings=256)
    measured = assert_equal_question_by_question(model, tokenizer, data_dir, limit=3)
    scores = measured.scores
    assert measured.mean == pytest.approx(sum(s.get("acc_norm", s["acc"]) for s in scores.values()) / 7)
    assert measured.mean_acc == pytest.approx(sum(s["acc"] for s in scores.values()) / 7)
    assert measured.mean_stderr is None  # two tasks have a single row here
    two = evaluate_tasks(model, tokenizer, "boolq,arc_easy", limit=3, data_dir=data_dir)
    errors = (scores["boolq"]["acc_stderr"], scores["arc_easy"]["acc_norm_stderr"])
    assert two.mean_stderr == pytest.approx(math.hypot(*errors) / 2)
    assert scores["boolq"]["rows"] == 3
    json.dumps(measured.to_json())


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=4), min_size=1, max_size=3))
def test_standard_error_of_the_mean_of_tasks(answers):
    """Against the variance of the mean when every task's questions are drawn anew, all draws counted."""
    scores, variance = [], 0.0
    for task in answers:
        share, rows = sum(task) / len(task), len(task)
        # What the harness gives: the sample's standard deviation, n - 1 below, over the root of n.
        scores.append({"acc": share, "acc_stderr": statistics.stdev(map(float, task)) / rows**0.5})
        means = [sum(draw) / rows for draw in itertools.product(map(float, task), repeat=rows)]
        variance += statistics.pvariance(means) * rows / (rows - 1)
    assert stderr_of_mean(scores) == pytest.approx(variance**0.5 / len(answers), abs=1e-12)


def test_a_mean_has_no_standard_error_where_a_task_has_none():
    assert stderr_of_mean([{"acc": 1.0, "acc_stderr": float("nan")}, {"acc": 0.5, "acc_stderr": 0.1}]) is None
    assert stderr_of_mean([{"acc": 1.0}]) is None
    assert stderr_of_mean([]) is None


@given(st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=4), min_size=1, max_size=3))
def test_standard_error_of_a_difference_is_of_the_same_questions(pairs_of_tasks):
    """Against the means of both models when every task's questions are drawn anew for both at once."""
    sides, variance = [], 0.0
    for place in (0, 1):
        samples = {
            str(task): [{"doc_id": n, "acc": float(pair[place])} for n, pair in enumerate(pairs)]
            for task, pairs in enumerate(pairs_of_tasks)
        }
        scores = {name: {"acc": statistics.mean(row["acc"] for row in rows)} for name, rows in samples.items()}
        mean = statistics.mean(score["acc"] for score in scores.values())
        sides.append(TaskScores(scores, mean, mean, None, {"tasks": list(samples)}, samples))
    for pairs in pairs_of_tasks:
        rows = len(pairs)
        draws = itertools.product(pairs, repeat=rows)
        apart = [sum(other - base for base, other in draw) / rows for draw in draws]
        variance += statistics.pvariance(apart) * rows / (rows - 1)
    gain = difference(*map(answers, sides))
    assert gain is not None
    assert gain[0] == pytest.approx(sides[1].mean - sides[0].mean, abs=1e-12)
    assert gain[1] == pytest.approx(variance**0.5 / len(pairs_of_tasks), abs=1e-12)
    assert difference(answers(sides[0]), answers(sides[0])) == (0.0, 0.0)
    sides[1].samples["0"].pop()
    assert difference(*map(answers, sides)) is None


def test_flips_count_what_a_difference_of_means_hides():
    """By hand: two of four questions of one task changed sides, and neither mean did; one of two of the other."""
    base = {"piqa": {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}, "boolq": {5: 1.0, 6: 1.0}}
    other = {"piqa": {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.0}, "boolq": {5: 1.0, 6: 0.0}}
    assert flips(base, other) == flips(other, base) == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert flips(base, base) == 0
    assert flips(base, {**other, "boolq": {5: 1.0, 7: 0.0}}) is None
    assert flips(base, {"piqa": other["piqa"]}) is None
    assert flips({}, {}) is None


@pytest.fixture
def many_rows(tmp_path):
    """Two dozen questions with the same options, and two dozen with options of their own."""
    for task, options in (("boolq", {"answer": True}), ("piqa", {"sol2": "stay", "label": 0})):
        rows = [
            {"question": f"is {n} old", "passage": f"Mill {n} is old.", "goal": "run", "sol1": f"to {n}", **options}
            for n in range(24)
        ]
        (tmp_path / task).mkdir()
        (tmp_path / task / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_a_model_of_one_answer_is_said_to_be_one(tokenizer, many_rows, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama", max_position_embeddings=256)
    measured = evaluate_tasks(model, tokenizer, "boolq,piqa", data_dir=many_rows)
    assert "fatal" not in capfd.readouterr().err  # of git, which the harness asks for a commit
    preferred = ["no" if a[0] > b[0] else "yes" for (a,), (b,) in (row["resps"] for row in measured.samples["boolq"])]
    word = max(("yes", "no"), key=preferred.count)
    share = preferred.count(word) / 24
    assert measured.commonest == {"boolq": (word, share)}
    for least, words in ((share, {"boolq": f"'{word}' to {share:.0%}"}), (share + 0.01, {})):
        assert measured.degenerate_tasks(least) == words
    read_back = TaskScores.from_json(json.loads(json.dumps(measured.with_answers())))
    assert read_back.to_json() == measured.to_json()
    assert answers(read_back) == answers(measured)
    few = evaluate_tasks(model, tokenizer, "boolq", limit=19, data_dir=many_rows)
    assert few.commonest == {}


def test_the_command_line_says_that_a_model_has_one_answer(dense_folder, many_rows):
    with other_thresholds(degenerate_share=0.5):
        done = run("evaluate", dense_folder, "--tasks", "boolq", "--data-dir", many_rows, "--device", "cpu")
    assert re.search(r"boolq: the model answers '(yes|no)' to \d+% of the questions", done.output)


@pytest.mark.parametrize(
    "argument", [("a text",), ("a question", {"until": ["."]}), ("a question", " an answer"), ("a", {}, {})]
)
def test_tasks_without_options_have_no_commonest_one(argument):
    row = {"arguments": [argument], "filtered_resps": ["words"]}
    assert _majority_answer([row] * MIN_QUESTIONS) is None


@pytest.mark.network
@pytest.mark.slow  # tiny models hold the same in the default level
@pytest.mark.parametrize("limit", [2, 100])  # the second takes about 4 minutes
def test_smollm2_equals_the_plain_harness(limit, smollm2, shared):
    assert_equal_question_by_question(*smollm2, shared, limit)


def test_few_shot_examples_come_from_the_training_rows(tokenizer, data_dir, tmp_path):
    model = tiny_model("llama", max_position_embeddings=256)
    with pytest.raises(UsageError, match=r"no train rows .* few-shot"):
        evaluate_tasks(model, tokenizer, "piqa", num_fewshot=1, data_dir=data_dir)
    for split in ("validation", "train"):
        (tmp_path / "piqa").mkdir(exist_ok=True)
        (tmp_path / "piqa" / f"{split}.jsonl").write_text((data_dir / "piqa" / "validation.jsonl").read_text())
    measured = evaluate_tasks(model, tokenizer, "piqa", num_fewshot=1, data_dir=tmp_path)
    prompt = measured.samples["piqa"][0]["arguments"][0][0]
    assert prompt.count("Question: ") == 2
    assert measured.protocol["num_fewshot"] == {"piqa": 1}


def test_mmlu_from_local_files(tokenizer, tmp_path):
    """A group of many tasks, each with its own folder, five examples before each question."""
    model = tiny_model("llama", max_position_embeddings=512)
    row = {"question": "What runs?", "choices": ["river", "mill", "sea", "head"], "answer": 0, "subject": "anatomy"}
    for split, count in (("test", 2), ("dev", 5)):
        (tmp_path / "mmlu" / "anatomy").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps({**row, "answer": i % 4}) + "\n" for i in range(count))
        (tmp_path / "mmlu" / "anatomy" / f"{split}.jsonl").write_text(text)
    measured = evaluate_tasks(model, tokenizer, ["mmlu_anatomy"], num_fewshot=5, data_dir=tmp_path)
    assert measured.samples["mmlu_anatomy"][0]["arguments"][0][0].count("Answer:") == 6
    with pytest.raises(UsageError, match="mmlu"):
        evaluate_tasks(model, tokenizer, ["mmlu"], num_fewshot=5, data_dir=tmp_path)


def test_the_known_places_hold_the_tasks():
    names = [*COMMONSENSE, "mmlu", "mmlu_stem", "longbench", "longbench_single"]
    assert set(names) <= set(task_manager(names).all_tasks)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("no task is named", {"tasks": ""}),
        ("limit 0", {"tasks": "piqa", "limit": 0}),
        ("must be 0 or more", {"tasks": "piqa", "num_fewshot": -1}),
        ("does not exist", {"tasks": "piqa", "data_dir": "/no/such/folder"}),
    ],
)
def test_what_cannot_be_run(message, arguments, tokenizer, data_dir):
    with pytest.raises(UsageError, match=message):
        evaluate_tasks(tiny_model("llama"), tokenizer, **{"data_dir": data_dir, **arguments})


def test_an_unknown_task_names_its_neighbours(monkeypatch):
    monkeypatch.setattr(
        harness_tasks, "TaskManager", lambda **_: TaskManager(include_defaults=False, include_path=ROOT / "arc")
    )  # all tasks take half a minute
    with pytest.raises(UsageError, match="did you mean arc_easy"):
        task_manager(["arc_eazy"])


def test_missing_and_broken_rows(tokenizer, tmp_path):
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="no validation rows of task 'piqa'"):
        evaluate_tasks(model, tokenizer, "piqa", data_dir=tmp_path)
    (tmp_path / "piqa").mkdir()
    for text, message in (("{'", "cannot read"), ("", "no rows"), ('{"goal": "x"}\n', "do not have the fields")):
        (tmp_path / "piqa" / "validation.jsonl").write_text(text)
        with pytest.raises(UsageError, match=message):
            run_harness(model, tokenizer, ["piqa"], data_dir=tmp_path)


def test_a_seed_draws_rows_and_examples(tokenizer, tmp_path):
    """The drawn rows score what they score among all rows, and the harness's own examples stand before them with 0."""
    model = tiny_model("llama", max_position_embeddings=512)
    rows = [
        {"goal": f"count {n}", "sol1": "past the old mill", "sol2": "she counted the heads", "label": n % 2}
        for n in range(12)
    ]
    (tmp_path / "piqa").mkdir()
    for split in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "piqa" / f"{split}.jsonl").write_text(text, encoding="utf-8")

    def scores(**options):
        return evaluate_tasks(model, tokenizer, "piqa", data_dir=tmp_path, **options)

    all_scores = scores()
    assert all_scores.protocol["seeded"] == []
    by_number = {row["doc_id"]: row["acc_norm"] for row in all_scores.samples["piqa"]}
    numbers = []
    for seed in (0, 1, 2):
        drawn = scores(limit=4, seed=seed, draw_rows=True)
        assert drawn.protocol["seeded"] == ["rows"]
        assert drawn.scores["piqa"]["rows"] == 4
        assert [row["acc_norm"] for row in drawn.samples["piqa"]] == [
            by_number[row["doc_id"]] for row in drawn.samples["piqa"]
        ]
        assert [row["doc"]["goal"] for row in drawn.samples["piqa"]] == [
            rows[row["doc_id"]]["goal"] for row in drawn.samples["piqa"]
        ]
        numbers.append([row["doc_id"] for row in drawn.samples["piqa"]])
    assert len({tuple(each) for each in numbers}) == 3
    assert all(each == sorted(set(each)) for each in numbers)
    assert scores(limit=4, seed=1, draw_rows=True).samples["piqa"][0]["doc_id"] == numbers[1][0]
    assert scores(limit=50, seed=1, draw_rows=True).protocol["seeded"] == []
    prompts = [
        [row["arguments"][0][0] for row in scores(limit=2, num_fewshot=2, **options).samples["piqa"]]
        for options in ({}, {"seed": 0}, {"seed": 1})
    ]
    assert prompts[0] == prompts[1] != prompts[2]
    assert scores(limit=2, num_fewshot=2).protocol["seeded"] == ["examples"]
