"""The real model, once for all tests here, and small folders of tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import slimgpt

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

ROWS = {
    "boolq/validation": [
        {"question": "is the mill old", "answer": True, "passage": "The river runs past the old mill."},
        {"question": "is the sea small", "answer": False, "passage": "The sea is more than a river."},
        {"question": "does she count", "answer": True, "passage": "She counted the heads."},
    ],
    "piqa/validation": [
        {"goal": "run to the sea", "sol1": "past the old mill", "sol2": "past the small model", "label": 0},
        {"goal": "answer at once", "sol1": "wrote them down", "sol2": "count the heads and write", "label": 1},
    ],
    "hellaswag/validation": [
        {
            "ind": 1, "activity_label": "The river", "ctx_a": "The river runs.", "ctx_b": "the mill",
            "endings": ["is old.", "is small [title] and worth more.", "wrote them.", "answers at once."], "label": "0",
        },
        {
            "ind": 2, "activity_label": "Heads", "ctx_a": "She counted.", "ctx_b": "nothing",
            "endings": ["is removed.", "runs.", "can make up for the rest.", "answers."], "label": "2",
        },
    ],
    "winogrande/validation": [
        {"sentence": "The river and the mill: _ runs on.", "option1": "river", "option2": "mill", "answer": "1"},
        {"sentence": "A model and a head: _ answers.", "option1": "head", "option2": "model", "answer": "2"},
    ],
    "arc_easy/test": [
        {"id": "1", "question": "What runs?", "choices": {"text": ["the river", "a small model", "the mill"],
         "label": ["A", "B", "C"]}, "answerKey": "A"},
        {"id": "2", "question": "What answers?", "choices": {"text": ["the river", "a small model"],
         "label": ["1", "2"]}, "answerKey": "2"},
    ],
    "arc_challenge/test": [
        {"id": "3", "question": "What is worth more?", "choices": {"text": ["one that answers", "nothing", "the sea"],
         "label": ["A", "B", "C"]}, "answerKey": "A"},
    ],
    "openbookqa/test": [
        {"id": "4", "question_stem": "The heads are", "choices": {"text": ["counted", "removed", "small", "worth it"],
         "label": ["A", "B", "C", "D"]}, "answerKey": "B"},
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A few rows of each of the seven tasks, in the schema of the hub."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        file = folder / f"{name}.jsonl"
        file.parent.mkdir()
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The data of the experiments, which is not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data")
    return SHARED


@pytest.fixture(scope="session")
def smollm2():
    return slimgpt.load("demo")
