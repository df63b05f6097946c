"""Tasks whose answers are generated, against plain lm-evaluation-harness on the same rows."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from unittest import mock

import datasets
import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slimgpt.errors import SlimGPTError, UsageError
from slimgpt.evaluation import harness, harness_tasks
from slimgpt.evaluation.answer_endings import endings_of
from slimgpt.evaluation.card_figures import task_figures
from slimgpt.evaluation.tasks import TaskScores, answers, check_tasks, difference, evaluate_tasks
from slimgpt.models.text_generation import Answer
from slimgpt.runtime.thresholds import other_thresholds
from tests.calibration.test_calibration import ENDLESS
from tests.cli.test_command_line import run
from tests.evaluation.test_tasks import ROOT
from tests.models.families import sharpened_model

TEMPLATE = "{% for m in messages %}Q {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}A{% endif %}"
GSM8K = [
    {"question": f"She counted {n} heads and {n} channels. How many?", "answer": f"{n} + {n}\n#### {2 * n}"}
    for n in range(2, 8)
]
IFEVAL = [
    {
        "key": key,
        "prompt": f"Write {key} words about the river without any commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "at least", "num_words": key}],
    }
    for key in (1, 3, 40)
]


@pytest.fixture(scope="module")
def model():
    return sharpened_model(3, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def templated(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, lines in {"gsm8k/train": GSM8K, "gsm8k/test": GSM8K, "ifeval/input_data": IFEVAL}.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return folder


def plain_harness(model, tokenizer, task, lines, **options):
    """The harness as it is, its own task, model class and generation; only what comes from the hub is local."""

    def load_dataset(*_, **__):
        return datasets.DatasetDict(dict.fromkeys(("train", "test"), datasets.Dataset.from_list(lines)))

    manager = TaskManager(include_defaults=False, include_path=[ROOT / task])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    with mock.patch("datasets.load_dataset", load_dataset):
        return lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, **options)


def assert_equal(scores: TaskScores, expected, task):
    ours, theirs = scores.samples[task], expected["samples"][task]
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs):
        assert one["arguments"][0][0] == other["arguments"][0][0]
        assert one["resps"] == other["resps"]
        assert one["filtered_resps"] == other["filtered_resps"]
        for metric in one["metrics"]:
            assert one[metric] == other[metric]
    for key, value in expected["results"][task].items():
        if isinstance(value, float) and key.endswith(("none", "strict-match")):
            assert scores.scores[task][key.split(",")[0]] == value


@pytest.mark.parametrize("chat", [False, True])
def test_gsm8k_is_that_of_the_plain_harness(chat, model, templated, rows):
    scores = evaluate_tasks(model, templated, "gsm8k", num_fewshot=2, data_dir=rows, chat_template=chat)
    expected = plain_harness(model, templated, "gsm8k", GSM8K, num_fewshot=2, apply_chat_template=chat)
    assert_equal(scores, expected, "gsm8k")
    assert len({row["resps"][0][0] for row in scores.samples["gsm8k"]}) > 1
    assert scores.protocol["chat_template"] is chat
    assert scores.endings["gsm8k"].answers == len(GSM8K)
    again = TaskScores.from_json(json.loads(json.dumps(scores.with_answers())))
    assert again.endings == scores.endings
    assert answers(again) == answers(scores) == {"gsm8k": dict.fromkeys(range(len(GSM8K)), 0.0)}


def test_ifeval_is_that_of_the_plain_harness(model, tokenizer, rows):
    pytest.importorskip("immutabledict")
    pytest.importorskip("langdetect")
    with mock.patch("nltk.download"):
        scores = evaluate_tasks(model, tokenizer, "ifeval", limit=2, data_dir=rows)
        expected = plain_harness(model, tokenizer, "ifeval", IFEVAL, limit=2)
    assert_equal(scores, expected, "ifeval")
    assert {"prompt_level_strict_acc", "inst_level_loose_acc"} <= scores.scores["ifeval"].keys()


def test_ifeval_scores_of_given_answers_are_the_harness_s_own(model, tokenizer, rows, monkeypatch):
    """The same answers through the task and through the functions that judge them."""
    pytest.importorskip("immutabledict")
    pytest.importorskip("langdetect")
    texts = ["The river", "The river, the mill and the sea", "one " * 50]

    def given(_model, _tokenizer, prompts, *_, **__):
        assert len(prompts) == len(texts)
        return [Answer((1, 2), text, True) for text in texts]

    monkeypatch.setattr(harness, "generate_answers", given)
    with mock.patch("nltk.download"):
        scores = evaluate_tasks(model, tokenizer, "ifeval", data_dir=rows)
        from lm_eval.tasks.ifeval import utils
    strict = [
        utils.test_instruction_following_strict(
            SimpleNamespace(**{**row, "instruction_id_list": row["instruction_id_list"]}), text
        ).follow_all_instructions
        for row, text in zip(IFEVAL, texts)
    ]
    assert strict == [True, False, True]
    assert [row["prompt_level_strict_acc"] for row in scores.samples["ifeval"]] == strict
    assert scores.scores["ifeval"]["prompt_level_strict_acc"] == pytest.approx(2 / 3)
    assert list(answers(scores)["ifeval"].values()) == [1.0, 0.0, 1.0]
    assert difference(answers(scores), answers(scores)) == (0.0, 0.0)


def test_sentences_of_ifeval_need_a_model_that_may_not_be_there(tmp_path, monkeypatch):
    pytest.importorskip("immutabledict")
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    (tmp_path / "ifeval").mkdir()
    row = {**IFEVAL[0], "instruction_id_list": ["length_constraints:number_sentences"]}
    row["kwargs"] = [{"relation": "at least", "num_sentences": 2}]
    lines = [json.dumps(each) + "\n" for each in (IFEVAL[0], row)]
    (tmp_path / "ifeval/train.jsonl").write_text("".join(lines), encoding="utf-8")
    with mock.patch("nltk.download"):
        with pytest.raises(UsageError, match="punkt_tab"):
            check_tasks("ifeval", data_dir=tmp_path)
        assert check_tasks("ifeval", limit=1, data_dir=tmp_path)[0] == ["ifeval"]


@pytest.mark.parametrize(
    "task",
    ["humaneval", *(pytest.param(task, marks=pytest.mark.slow) for task in ("humaneval_instruct", "mbpp"))],
)
def test_no_code_runs_unasked(task, model, tokenizer, rows, monkeypatch):
    """Whatever the environment allows."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with (
        mock.patch("evaluate.load", side_effect=AssertionError("built")),
        mock.patch.object(harness_tasks, "_build") as build,
    ):
        with pytest.raises(UsageError, match=f"'{task}' runs the code .* --confirm-run-unsafe-code"):
            evaluate_tasks(model, tokenizer, task, data_dir=rows)
        with pytest.raises(UsageError, match="--confirm-run-unsafe-code"):
            check_tasks(task, data_dir=rows)
    assert not build.called


def test_code_is_allowed_while_it_is_confirmed_alone(monkeypatch):
    import os

    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    for allowed in (True, False):
        with harness_tasks.code_allowed(allowed):
            assert os.environ["HF_ALLOW_CODE_EVAL"] == str(int(allowed))
        assert "HF_ALLOW_CODE_EVAL" not in os.environ


def test_endings_count_loops_and_answers_without_an_end():
    straight, loop = tuple(range(40)), (1, 2, 3, 4) * 10
    kinds = [(straight, True), (straight, False), (loop, True), (loop, False)]
    endings = endings_of(Answer(ids, "", stopped) for ids, stopped in kinds)
    assert (endings.answers, endings.loops, endings.unstopped, endings.either) == (4, 0.5, 0.5, 0.75)


def test_a_template_that_is_not_there_is_refused(model, tokenizer, rows):
    with pytest.raises(UsageError, match="has no chat template"):
        evaluate_tasks(model, tokenizer, "gsm8k", data_dir=rows, chat_template=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ENDLESS, "has not ended after 0.3 seconds"),
        ("{{ raise_exception('no questions') }}", "refuses the conversation: no questions"),
    ],
)
def test_a_template_that_refuses_or_does_not_end_is_one_line(template, message, model, tokenizer, rows):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    with (
        other_thresholds(template_seconds=0.3),
        pytest.raises(SlimGPTError, match=f"a question of a task: .*{message}"),
    ):
        evaluate_tasks(model, chatty, "gsm8k", limit=1, num_fewshot=0, data_dir=rows, chat_template=True)


def test_the_commands_show_loops_beside_the_score(dense_folder, rows, tmp_path):
    options = ["--tasks", "gsm8k", "--num-fewshot", 0, "--limit", 2, "--data-dir", rows, "--device", "cpu"]
    with mock.patch("slimgpt.evaluation.harness.Scorer.max_gen_toks", 8):
        done = run("evaluate", dense_folder, *options, "--json", tmp_path / "scores.json")
        assert done.exit_code == 0, done.output
        compared = run(
            "compare", dense_folder, dense_folder, *options, "--out", tmp_path / "compared", "--no-speed",
            "--samples", 0, "--window", 32, "--max-tokens", 64,
        )  # fmt: skip
    assert compared.exit_code == 0, compared.output
    assert "answers loop" in " ".join(done.output.split())
    assert "rows from local files, lm_eval" in " ".join(done.output.split())
    endings = json.loads((tmp_path / "scores.json").read_text())["tasks"]["endings"]["gsm8k"]
    assert endings["answers"] == 2
    assert f'"endings": {{"gsm8k": {json.dumps(endings)}}}' in json.dumps(
        json.loads((tmp_path / "compared/compare.json").read_text())
    )
    assert "loop or never stop" in (tmp_path / "compared/report.html").read_text()


def test_how_answers_end_goes_to_the_card(model, tokenizer, rows):
    with mock.patch("slimgpt.evaluation.harness.Scorer.max_gen_toks", 8):
        scores = evaluate_tasks(model, tokenizer, "gsm8k", limit=2, num_fewshot=0, data_dir=rows)
    (figures,) = task_figures(scores)
    assert figures["metric"] == "exact_match"
    assert figures["endings"] == scores.to_json()["endings"]["gsm8k"]
    multiple_choice = TaskScores({"boolq": {"acc": 0.5}}, 0.5, 0.5, None, {**scores.protocol, "tasks": ["boolq"]}, {})
    (figures,) = task_figures(multiple_choice)
    assert "endings" not in figures


def test_options_of_tasks_are_refused_before_anything_is_measured(dense_folder, text_file, rows):
    text = ["evaluate", dense_folder, "--text", text_file, "--device", "cpu"]
    for option in ("--chat-template", "--confirm-run-unsafe-code"):
        alone = run(*text, option)
        assert alone.exit_code == 2
        assert "give --tasks, too" in alone.output
    base = run(*text, "--tasks", "gsm8k", "--data-dir", rows, "--chat-template")
    assert base.exit_code == 2
    assert "has no chat template" in base.output
    assert "perplexity" not in base.output


def test_languages_are_detected_the_same_every_time():
    """A short text in two languages; without a seed the answer differs between calls."""
    langdetect = pytest.importorskip("langdetect")
    text = "Das is good und very schoen, more or less."
    languages = []
    for _ in range(10):
        with harness._languages_repeatable():
            languages.append([(each.lang, each.prob) for each in langdetect.detect_langs(text)])
    assert all(each == languages[0] for each in languages)
    assert langdetect.DetectorFactory.seed is None
    assert any(str(langdetect.detect_langs(text)) != str(langdetect.detect_langs(text)) for _ in range(20))
