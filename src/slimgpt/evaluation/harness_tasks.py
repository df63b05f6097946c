"""Tasks of lm-evaluation-harness, built with rows from local files, and which of their rows a seed draws."""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from slimgpt.errors import UsageError, one_line
from slimgpt.evaluation.code_execution import ALLOWED, local_code_eval
from slimgpt.evaluation.task_rows import read_rows

FOLDERS = {
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "mmlu": "mmlu/default",
    "longbench": "longbench",
    "ifeval": "ifeval",
    "gsm8k": "gsm8k",
    "humaneval": "humaneval",
}
"""Where the harness defines some tasks; reading all of its ten thousand definitions takes half a minute."""


ROW_BY_ROW = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""Tasks that use all of their rows in order, so that the first of them can be cut off before anything else."""


RUN_CODE = ("humaneval", "mbpp")
"""Tasks that run the code that a model writes, by the beginnings of their names."""

SENTENCES = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
"""Instructions of IFEval that are judged with NLTK's model of sentences."""


@contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
    """While this lasts, the metric that runs code does so or refuses to, whatever the environment said before."""
    with mock.patch.dict(os.environ, {ALLOWED: "1" if allowed else "0"}):
        yield


@contextmanager
def _code_runs(allowed: bool) -> Iterator[None]:
    """While this lasts, tasks that are built run code with our metric, if they may."""
    with code_allowed(allowed), local_code_eval():
        yield


def build_tasks(
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    run_code: bool = False,
) -> tuple[TaskManager, list[Any]]:
    """The harness's definitions, and its tasks and groups with their rows; the arguments are those of
    :func:`run_harness`.

    Raises:
        UsageError: a task is unknown, its rows cannot be had, or it runs code and may not.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(tasks)
    for task in tasks:  # before it is built: its module runs code when it is imported
        if task.startswith(RUN_CODE):
            _check_code(task, run_code)
    with redirect_stderr(io.StringIO()), _rows_from(data_dir, num_fewshot, limit), _code_runs(run_code):
        built = [item for task in tasks for item in _build(manager, task, data_dir)]
    for item in built:
        if getattr(item, "UNSAFE_CODE", False):
            _check_code(str(item.config.task), run_code)
        if isinstance(item, ConfigurableTask) and str(item.config.task).startswith("ifeval"):
            _check_sentences(item, limit)
    return manager, built


def _check_code(task: str, run_code: bool) -> None:
    """Refuse a task that runs code.

    Raises:
        UsageError: it was not allowed.
    """
    if not run_code:
        raise UsageError(
            f"task '{task}' runs the code that the model writes, on this machine and as this user; in a container or "
            "a virtual machine, pass --confirm-run-unsafe-code"
        )


def _check_sentences(task: ConfigurableTask, limit: int | None) -> None:
    """Refuse rows of IFEval that cannot be judged here, before answers are written.

    Raises:
        UsageError: NLTK's model of sentences is not there.
    """
    import nltk

    rows: list[Any] = list(task.test_docs() or [])[:limit]
    if not any(name in SENTENCES for row in rows for name in row["instruction_id_list"]):
        return
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UsageError(
            "task 'ifeval' judges sentences with NLTK's punkt_tab, which is not here: python -m nltk.downloader "
            "punkt_tab, or a --limit before the first row that needs it"
        ) from error


def task_manager(tasks: Sequence[str]) -> TaskManager:
    """The harness's definitions: of these tasks where we know their place, else all of them.

    Raises:
        UsageError: a task is unknown.
    """
    root = Path(lm_eval.__file__).parent / "tasks"
    places = {place for task in tasks for name, place in FOLDERS.items() if task == name or task.startswith(f"{name}_")}
    manager = TaskManager(include_defaults=False, include_path=[root / place for place in sorted(places)])
    if any(task not in manager.task_index for task in tasks):
        manager = TaskManager()
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, 5)
        raise UsageError(
            f"task '{unknown[0]}' is unknown to lm-evaluation-harness"
            + (f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists them")
        )
    return manager


def _build(manager: TaskManager, task: str, data_dir: Path | None) -> list[Any]:
    """The task or group of a name; several for a tag."""
    try:
        loaded = manager.load([task])
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"task '{task}' needs {error.name or one_line(error)}: pip install 'slimgpt[eval]'") from error
    except Exception as error:
        reason = one_line(error)
        if data_dir is None:
            raise
        raise UsageError(
            f"the rows of task '{task}' in {data_dir} do not have the fields that they have on the hub: {reason}"
        ) from error
    group = loaded.get("groups", {}).get(task)
    return [group] if group is not None else list(loaded["tasks"].values())


@contextmanager
def _rows_from(data_dir: Path | None, num_fewshot: int | None, limit: int | None) -> Iterator[None]:
    """While this lasts, tasks take their rows from local files, or say clearly that the hub gave none."""
    original = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **rest: Any) -> None:
        config = task.config
        if data_dir is not None:
            splits = _splits(task, num_fewshot)
            task.dataset = read_rows(data_dir, str(config.task), config.dataset_path, config.dataset_name, splits)
            if limit is not None and config.task in ROW_BY_ROW:  # the harness would prepare all, several times
                evaluated = config.test_split or config.validation_split
                task.dataset[evaluated] = task.dataset[evaluated].select(
                    range(min(limit, len(task.dataset[evaluated])))
                )
            return
        try:
            original(task, dataset_kwargs, **rest)
        except Exception as error:
            reason = one_line(error)
            raise UsageError(
                f"cannot fetch the rows of task '{config.task}' from the hub ({reason}); give them with --data-dir"
            ) from error

    with mock.patch.object(ConfigurableTask, "download", download):
        yield


def _splits(task: ConfigurableTask, num_fewshot: int | None) -> dict[str, str]:
    """The splits that a task reads, and what it cannot do without them; nothing for those it can do without."""
    config = task.config
    evaluated = config.test_split or config.validation_split
    examples = task.fewshot_cfg.split or config.training_split or config.validation_split
    shots = num_fewshot if num_fewshot is not None and config.num_fewshot != 0 else config.num_fewshot
    splits = dict.fromkeys(
        name for name in (evaluated, examples, config.training_split, config.validation_split) if name
    )
    purposes = dict.fromkeys(splits, "")
    if examples and shots:
        purposes[examples] = "few-shot examples"
    return purposes | ({evaluated: "questions"} if evaluated else {})


def drawn_rows(manager: TaskManager, built: list[Any], limit: int, seed: int) -> dict[str, list[int]]:
    """Numbers of rows of every task, ascending: ``limit`` of them, drawn without replacement by seed and task."""
    drawn = {}
    for name, task in single_tasks(manager, built).items():
        count = len(task.eval_docs)
        drawn[name] = sorted(random.Random(f"{seed} {name}").sample(range(count), min(limit, count)))
    return drawn


def single_tasks(manager: TaskManager, built: list[Any]) -> dict[str, Any]:
    """The tasks by name, those of groups, too."""
    return dict(manager.load(built)["tasks"])


def seeded(manager: TaskManager, built: list[Any], drawn: dict[str, list[int]] | None) -> list[str]:
    """The parts of a task that another seed changes: ``rows``, ``examples`` before a question, sampled ``tokens``."""
    tasks = single_tasks(manager, built)
    rows = drawn is not None and any(len(numbers) < len(tasks[name].eval_docs) for name, numbers in drawn.items())
    examples = any(task.get_config("num_fewshot") and _draws_examples(task) for task in tasks.values())
    tokens = any((task.get_config("generation_kwargs") or {}).get("do_sample") for task in tasks.values())
    kinds = {"rows": rows, "examples": examples, "tokens": tokens}
    return [kind for kind, changed in kinds.items() if changed]


def _draws_examples(task: Any) -> bool:
    """Whether a task takes other examples with another seed; some take the first ones."""
    return not isinstance(getattr(task, "sampler", None), FirstNSampler)
