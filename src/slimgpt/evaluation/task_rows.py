"""Rows of tasks from local files, in the schema that they have on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from slimgpt.errors import AssetError, UsageError
from slimgpt.io.arrow import check_pyarrow

TaskRow = dict[str, Any]


def _boolq(row: TaskRow) -> TaskRow:
    """``google/boolq`` says ``answer: true`` where SuperGLUE, which the harness reads, says ``label: 1``."""
    return row if "label" in row else {**row, "label": int(row["answer"])}


ADAPTERS: dict[str, Callable[[TaskRow], TaskRow]] = {"boolq": _boolq}
"""Tasks whose rows are published in two schemas."""


FILES = {"ifeval": ("input_data", "ifeval_input_data"), "humaneval": ("HumanEval",)}
"""Names of files that tasks of a single split are published under."""


FOLDERS = {"openai/openai_humaneval": "humaneval"}
"""Folders of datasets whose tasks have other names, such as ``humaneval_instruct``."""


def read_rows(
    data_dir: Path, task: str, dataset: str | None, config: str | None, splits: Mapping[str, str]
) -> dict[str, Any]:
    """The splits of a task as ``datasets``; those that are not there and not needed are empty.

    They are looked for in ``data_dir/task``, in ``data_dir/dataset/config`` (``mmlu/anatomy``) and in a folder of
    :data:`FOLDERS`, as ``split.jsonl``, ``split.json`` (a list of rows) or ``split.parquet``, or under a name of
    :data:`FILES`.

    Args:
        splits: by name, what the task needs them for; nothing if it can do without.

    Raises:
        UsageError: a split is missing or cannot be read.
    """
    from datasets import Dataset

    places = [data_dir / task]
    if dataset:
        places += [data_dir / dataset.rsplit("/", 1)[-1] / (config or ""), data_dir / dataset.rsplit("/", 1)[-1]]
        places += [data_dir / FOLDERS[dataset]] if dataset in FOLDERS else []
    rows: dict[str, list[TaskRow]] = {}
    for split, purpose in splits.items():
        names = (split, *FILES.get(task, ()))
        files = [place / f"{name}{suffix}" for place in places for name in names for suffix in _READERS]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            rows[split] = [ADAPTERS.get(task, dict)(row) for row in _read(file)]
        elif purpose:
            raise UsageError(
                f"{data_dir} has no {split} rows of task '{task}' for its {purpose}: "
                f"no {places[0] / split}{{{','.join(_READERS)}}}; "
                "`slimgpt data fetch` makes folders of the seven commonsense tasks, of mmlu, and of the questions of "
                "gsm8k (--num-fewshot 0, or gsm8k_cot) and humaneval"
            )
    columns = next(iter(rows.values()))[0] if rows else {}
    empty = {name: [] for name in columns}
    return {split: Dataset.from_list(rows[split]) if split in rows else Dataset.from_dict(empty) for split in splits}


def stamp_rows(data_dir: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of rows below a folder: another list says that rows may be others."""
    files = sorted(file for file in data_dir.rglob("*") if file.suffix in _READERS and file.is_file())
    return [(str(file.relative_to(data_dir)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _read(file: Path) -> list[TaskRow]:
    try:
        rows = _READERS[file.suffix](file)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the rows in {file}: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{file} holds no rows: it must list at least one object with the fields of the task")
    return rows


def _jsonl(file: Path) -> list[TaskRow]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _json(file: Path) -> list[TaskRow]:
    return json.loads(file.read_text(encoding="utf-8"))


def _parquet(file: Path) -> list[TaskRow]:
    check_pyarrow(file)
    import pyarrow.parquet as pq

    return pq.read_table(file).to_pylist()


_READERS: dict[str, Callable[[Path], list[TaskRow]]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}


def write_rows(file: Path, rows: Iterable[TaskRow]) -> None:
    """Write rows as JSON lines, in a folder that is made for them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def check_count(source: str, task: str, count: int, expected: int) -> None:
    """Refuse a source that has not all rows of a task.

    Raises:
        AssetError: it has another number.
    """
    if count != expected:
        raise AssetError(f"{source} has {count:,} rows of {task}, expected {expected:,}")
