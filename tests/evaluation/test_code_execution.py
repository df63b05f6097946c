"""Programs run against their tests: what passes, what does not, and HumanEval from the rows to the score."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from slimgpt.errors import UsageError
from slimgpt.evaluation import harness
from slimgpt.evaluation.code_execution import CodeEval, pass_at_k, passes
from slimgpt.evaluation.tasks import evaluate_tasks
from slimgpt.models.text_generation import Answer
from tests.cli.test_command_line import run
from tests.models.families import sharpened_model

# The first is right whatever is written into its last line, a comment; the second is never right.
ROWS = [
    {
        "task_id": "HumanEval/0",
        "prompt": "def double(x):\n    return 2 * x\n    #",
        "entry_point": "double",
        "canonical_solution": " done\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "def half(x):\n    return x\n    #",
        "entry_point": "half",
        "canonical_solution": "\n    return x / 2\n",
        "test": "def check(candidate):\n    assert candidate(3) == 1.5\n",
    },
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "humaneval").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "humaneval" / "HumanEval.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = 1\nassert x == 1", True),
        ("assert False", False),
        ("def f(:", False),
        ("import sys; sys.exit(0)\nassert False", False),
        ("import os; os._exit(0)", False),
        ("input()", False),
        ("import os; assert set(os.environ) <= {'PATH', 'SYSTEMROOT', 'LC_CTYPE'}", True),
        ("import os; assert os.listdir('.') == ['program.py']; open('made', 'w').close()", True),
        ("if __name__ == '__main__':\n    assert False", True),
        ("x = 'ä' * 10\nassert len(x) == 10", True),
        ("x = bytes(1 << 40)", False),
    ],
)
def test_programs_that_come_to_their_end_pass(source, expected):
    assert passes(source) is expected


def test_a_program_without_an_end_is_ended_with_what_it_started(tmp_path):
    file = tmp_path / "child"
    start = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"open({str(file)!r}, 'w').write(str(child.pid))\n"
    )
    assert not passes(start + "while True: pass", timeout=2.0)
    child = int(file.read_text())
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":  # dead, and nobody waits for it
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the program started still runs")


def test_pass_at_k_counts_draws():
    """Against all draws of k of n programs."""
    for total in range(1, 6):
        for right, k in itertools.product(range(total + 1), range(1, total + 1)):
            draws = list(itertools.combinations([True] * right + [False] * (total - right), k))
            assert pass_at_k(total, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_metric_is_the_mean_over_problems(monkeypatch):
    tests = ["assert add(2, 3) == 5", "assert add(2, 3) == 5"]
    right, wrong = "def add(a, b): return a + b", "def add(a, b): return a * b"
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(UsageError, match="--confirm-run-unsafe-code"):
        CodeEval().compute(tests, [[right], [wrong]])
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    shares, passed = CodeEval().compute(tests, [[right, wrong, wrong], [wrong, wrong, wrong]], k=(1, 2, 4))
    assert passed == {0: [True, False, False], 1: [False, False, False]}
    assert shares == pytest.approx({"pass@1": 1 / 6, "pass@2": 1 / 3})


def test_humaneval_from_rows_to_the_score(tokenizer, rows, tmp_path):
    """A tiny model's own answers, and code that runs."""
    model = sharpened_model(3, max_position_embeddings=2048)
    model.generation_config.eos_token_id = list(range(0, len(tokenizer), 3))  # its answers are short
    dense_folder = tmp_path / "dense"
    model.save_pretrained(dense_folder)
    tokenizer.save_pretrained(dense_folder)
    options = ["--tasks", "humaneval", "--data-dir", rows, "--device", "cpu", "--json", tmp_path / "scores.json"]
    refused = run("evaluate", dense_folder, *options)
    assert refused.exit_code == 2
    assert "--confirm-run-unsafe-code" in refused.output
    done = run("evaluate", dense_folder, *options, "--confirm-run-unsafe-code")
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert scores["scores"]["humaneval"]["pass@1"] == 0.5
    assert scores["endings"]["humaneval"]["answers"] == 2


def test_given_programs_are_judged_by_running_them(tokenizer, rows, tmp_path, monkeypatch):
    model = sharpened_model(3, max_position_embeddings=2048)
    texts = ["\n    assert False", "\n    pass\ndef half(x):\n    return 1.5"]

    def given(_model, _tokenizer, prompts, *_, **__):
        return [Answer((1, 2), text, True) for text, _ in zip(texts, prompts)]

    monkeypatch.setattr(harness, "generate_answers", given)
    scores = evaluate_tasks(model, tokenizer, "humaneval", data_dir=rows, confirm_run_unsafe_code=True)
    # A stop string cuts the second function, which would be right.
    assert [row["pass@1"] for row in scores.samples["humaneval"]] == [1.0, 0.0]
    texts[0] = "    return x / 2"
    (tmp_path / "humaneval").mkdir()
    row = {**ROWS[1], "prompt": "def half(x):\n"}
    (tmp_path / "humaneval" / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    scores = evaluate_tasks(model, tokenizer, "humaneval", data_dir=tmp_path, confirm_run_unsafe_code=True)
    assert scores.scores["humaneval"]["pass@1"] == 1.0
