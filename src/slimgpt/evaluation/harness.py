"""lm-evaluation-harness, with a model in memory and, if wanted, with rows from local files. Needs `slimgpt[eval]`."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError, one_line
from slimgpt.evaluation.loglikelihood import log_likelihoods
from slimgpt.evaluation.task_rows import read_rows

OnTasksStart = Callable[[int], Callable[[int], None]]

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
}
"""Where the harness defines some tasks; reading all of its ten thousand definitions takes half a minute."""


ROW_BY_ROW = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""Tasks that use all of their rows in order, so that the first of them can be cut off before anything else."""


class Scorer(HFLM):
    """The harness's own model class, except that the context of a question goes through the model once."""

    on_start: OnTasksStart | None = None
    if TYPE_CHECKING:  # the harness registers its class with a decorator that hides them
        model: PreTrainedModel
        max_length: int

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002
        override_bs: int | None = None,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        progress = self.on_start(len(pairs)) if self.on_start else None
        return log_likelihoods(self.model, pairs, self.max_length, progress)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    on_start: OnTasksStart | None = None,
) -> dict[str, Any]:
    """Results of ``lm_eval.simple_evaluate`` for tasks, groups and tags by name.

    Args:
        data_dir: rows come from files below it; everything else of a task stays the harness's.
        on_start: told how many requests there are; gives what is called as they are answered.

    Raises:
        UsageError: a task is unknown, or its rows cannot be had.
    """
    manager, built = build_tasks(tasks, limit, num_fewshot, data_dir)
    with redirect_stderr(io.StringIO()):  # its bars and warnings are not ours
        scorer = Scorer(pretrained=model, tokenizer=tokenizer, batch_size=8)  # type: ignore[arg-type]
        scorer.on_start = on_start
        results = simple_evaluate(
            model=scorer,
            tasks=built,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
        )
    assert results is not None  # only the other processes of a distributed run get nothing
    return dict(results)


def build_tasks(
    tasks: Sequence[str], limit: int | None = None, num_fewshot: int | None = None, data_dir: Path | None = None
) -> tuple[TaskManager, list[Any]]:
    """The harness's definitions, and its tasks and groups with their rows; the arguments are those of
    :func:`run_harness`.

    Raises:
        UsageError: a task is unknown, or its rows cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(tasks)
    with redirect_stderr(io.StringIO()), _rows_from(data_dir, num_fewshot, limit):
        return manager, [item for task in tasks for item in _build(manager, task, data_dir)]


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
    except Exception as error:
        if data_dir is None:
            raise
        reason = one_line(error)
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
