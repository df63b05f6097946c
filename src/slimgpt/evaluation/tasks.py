"""Accuracy on the tasks of lm-evaluation-harness."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError
from slimgpt.evaluation.answer_endings import AnswerEndings
from slimgpt.io.result import Result
from slimgpt.runtime.devices import dtype_name
from slimgpt.runtime.thresholds import thresholds

COMMONSENSE = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
ALIASES = {"commonsense": COMMONSENSE}
"""Names for several tasks. ``commonsense``: the seven zero-shot tasks of the pruning literature."""

MEAN_METRICS = ("acc_norm", "acc")
"""A task's score in means is the first of these that it has."""

GENERATED_METRICS = ("prompt_level_strict_acc", "exact_match", "pass@1")
"""The same of tasks whose answers are generated: IFEval, GSM8K, HumanEval."""

MIN_QUESTIONS = 20
"""Fewer questions may have the same answer by chance."""

Answers = dict[str, dict[int, float]]
"""The score of every question, by task and number."""


@dataclass(frozen=True, repr=False)
class TaskScores(Result):
    """Scores of tasks, and how they were taken.

    Args:
        scores: by task or group: its metrics (``acc``, ``acc_norm``, ...), their ``_stderr``, and ``rows``.
        mean: over the tasks asked for, of ``acc_norm`` where a task has it, else ``acc``, as the literature has it;
            ``None`` where a task has neither.
        mean_acc: the same of ``acc`` alone.
        mean_stderr: standard error of ``mean``: how far another draw of as many questions would move it; see
            :func:`stderr_of_mean`.
        commonest: by task, of those whose questions all have the same options, such as yes and no: the option that the
            model prefers most often, and the share of questions where it does. Not of tasks of a few questions.
        endings: of generated answers, by task: how many loop or never stop; see
            :class:`~slimgpt.evaluation.answer_endings.AnswerEndings`.
        samples: by task, what the harness logs of every row; left out of :meth:`to_json`.
        protocol: everything that changes the numbers.
    """

    scores: dict[str, dict[str, float]]
    mean: float | None
    mean_acc: float | None
    mean_stderr: float | None
    protocol: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    commonest: dict[str, tuple[str, float]] = field(default_factory=dict)
    endings: dict[str, AnswerEndings] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, without the samples."""
        return {key: value for key, value in asdict(self).items() if key != "samples"}

    def with_answers(self) -> dict[str, Any]:
        """:meth:`to_json` and, of the samples, the score of every question."""
        samples = {
            name: [{"doc_id": number, str(metric_of(self.scores[name])): score} for number, score in by_number.items()]
            for name, by_number in answers(self).items()
        }
        return {**self.to_json(), "samples": samples}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read the values of :meth:`with_answers`, also from a JSON file."""
        commonest = {name: (option, share) for name, (option, share) in values["commonest"].items()}
        endings = {name: AnswerEndings(**each) for name, each in values.get("endings", {}).items()}
        return cls(**{**values, "commonest": commonest, "endings": endings})

    def degenerate_tasks(self, min_share: float | None = None) -> dict[str, str]:
        """Tasks whose score mostly reflects how often the model's preferred option is right.

        Args:
            min_share: share of the questions for which one option is preferred; by default ``degenerate_share`` of
                :class:`~slimgpt.runtime.thresholds.Thresholds`.

        Returns:
            By task the option and its share in words.
        """
        limit = thresholds().degenerate_share if min_share is None else min_share
        return {
            name: f"'{option}' to {share:.0%}" for name, (option, share) in self.commonest.items() if share >= limit
        }


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] = "commonsense",
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    on_start: Callable[[int], Callable[[int], None]] | None = None,
    *,
    chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
    seed: int = 0,
    draw_rows: bool = False,
) -> TaskScores:
    """Scores of a model in memory on tasks of lm-evaluation-harness.

    Args:
        tasks: names of tasks, groups or tags of the harness, or of :data:`ALIASES`; a string may list several.
        limit: only the first so many rows of every task.
        num_fewshot: examples before every question; by default what the task says.
        data_dir: take the rows from files here instead of the hub; see :func:`slimgpt.evaluation.task_rows.read_rows`.
        on_start: told how many requests there are; gives what is called with the number answered since.
        chat_template: put questions through the tokenizer's chat template.
        confirm_run_unsafe_code: let tasks such as HumanEval run the code that the model writes, as this user.
        seed: of sampled tokens and of the examples before a question; 0 gives the harness's own examples.
        draw_rows: let the seed draw the rows that ``limit`` leaves, instead of the first.

    Raises:
        UsageError: the harness is not installed, a task is unknown, its rows cannot be had, it runs code and may not,
            or there is no chat template.
    """
    names, folder = check_tasks(tasks, limit, num_fewshot, data_dir, rows=False)
    if chat_template:
        check_chat_template(tokenizer)
    output = _harness().run_harness(
        model,
        tokenizer,
        names,
        limit,
        num_fewshot,
        folder,
        on_start,
        chat_template=chat_template,
        run_code=confirm_run_unsafe_code,
        seed=seed,
        draw_rows=draw_rows,
    )
    scores = {name: _metrics(output, name) for name in {**output["results"], **(output.get("groups") or {})}}
    asked = [scores[name] for name in names if name in scores]
    return TaskScores(
        scores=scores,
        mean=mean_of(asked),
        mean_acc=mean_of(asked, ("acc",)),
        mean_stderr=stderr_of_mean(asked),
        samples=output["samples"],
        commonest={
            name: one for name, rows in output["samples"].items() if (one := _majority_answer(rows)) is not None
        },
        endings=output["endings"],
        protocol={
            "harness": f"lm_eval {output['lm_eval_version']}",
            "tasks": names,
            "versions": output["versions"],
            "num_fewshot": output["n-shot"],
            "limit": limit,
            "rows_drawn": draw_rows,
            "seed": seed,
            "seeded": output["seeded"],
            "rows_from": "the hub" if folder is None else "local files",
            "chat_template": chat_template,
            "bos": bool(getattr(tokenizer, "add_bos_token", False)),
            "mean_of": "acc_norm where the task has it, else acc",
            "dtype": dtype_name(model.dtype),
            "device": model.device.type,
        },
    )


def check_tasks(
    tasks: str | Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
    rows: bool = True,
    confirm_run_unsafe_code: bool = False,
) -> tuple[list[str], Path | None]:
    """Refuse what :func:`evaluate_tasks` would refuse, before anything long is done.

    Args:
        rows: also see that the harness knows the tasks, and that their rows are there.

    Returns:
        The names of the tasks, aliases replaced, and the folder of their rows.

    Raises:
        UsageError: as :func:`evaluate_tasks`.
    """
    names = task_names(tasks)
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit} leaves no rows; it must be at least 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise UsageError(f"num_fewshot {num_fewshot} must be 0 or more")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"the data folder {folder} does not exist")
    harness = _harness()
    if rows:
        harness.build_tasks(names, limit, num_fewshot, folder, confirm_run_unsafe_code)
    return names, folder


def check_chat_template(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
    """Refuse to put questions through a chat template where there is none.

    Args:
        name: of the model, where there are several.

    Raises:
        UsageError: the tokenizer has none.
    """
    if not tokenizer.chat_template:
        whose = "the tokenizer" if name is None else f"the tokenizer of {name}"
        raise UsageError(f"{whose} has no chat template; leave out --chat-template")


def task_names(tasks: str | Sequence[str]) -> list[str]:
    """Task names, aliases replaced, each once.

    Raises:
        UsageError: none is given.
    """
    words = tasks.split(",") if isinstance(tasks, str) else tasks
    names = [name for word in words for name in ALIASES.get(word.strip(), (word.strip(),)) if name]
    if not names:
        raise UsageError("no task is named; give for example --tasks commonsense, or boolq,piqa")
    return list(dict.fromkeys(names))


def _harness() -> ModuleType:
    """Our way through lm-evaluation-harness, which is an extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        from slimgpt.evaluation import harness
    except ImportError as error:
        raise UsageError(
            f"tasks need lm-evaluation-harness ({error.name} is missing): pip install 'slimgpt[eval]'"
        ) from error
    return harness


def _metrics(output: dict[str, Any], name: str) -> dict[str, float]:
    """The numbers of a task, without the names of the harness's filters where there is one."""
    values = output["results"].get(name) or output["groups"][name]
    metrics: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, int | float) and "," in key:
            metrics.setdefault(key.split(",")[0], float(value))
    rows = output["n-samples"].get(name)
    return {**metrics, **({"rows": rows["effective"]} if rows else {})}


def _majority_answer(rows: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    """The option that is preferred most often and its share, where all of many questions have the same options."""
    asked = [[argument[1:] for argument in row["arguments"]] for row in rows]
    if len(rows) < MIN_QUESTIONS or any(each != asked[0] for each in asked):
        return None
    options = [str(rest[0]).strip() for rest in asked[0] if len(rest) == 1 and isinstance(rest[0], str)]
    if not 1 < len(options) == len(asked[0]):  # something else is asked for than a choice
        return None
    likelihoods = [[response[0] for response in row["filtered_resps"]] for row in rows]
    preferred = Counter(max(range(len(options)), key=values.__getitem__) for values in likelihoods)
    (option, count), *_ = preferred.most_common(1)
    return options[option], count / len(rows)


def stderr_of_mean(scores: Sequence[dict[str, float]]) -> float | None:
    """Standard error of the mean over tasks of ``acc_norm`` where a task has it, else ``acc``: tasks are independent
    samples of questions, so it is the root of the sum of their squared standard errors over their number. ``None``
    where a task has none, as with a single row.

    Args:
        scores: of every task its metrics and their ``_stderr``.
    """
    errors = [score.get(f"{metric}_stderr") for score in scores if (metric := metric_of(score, MEAN_METRICS))]
    known = [error for error in errors if error is not None and math.isfinite(error)]
    return math.hypot(*known) / len(known) if known and len(known) == len(scores) else None


def answers(result: TaskScores) -> Answers:
    """The score of every question of the tasks: ``acc_norm`` where a task has it, else ``acc``, or the metric of a task
    whose answers are generated.

    Empty where a task has no questions of its own, as a group has.
    """
    rows = {name: _rows_of(result.samples.get(name, [])) for name in result.protocol["tasks"]}
    return {
        name: {row["doc_id"]: float(row[metric]) for row in rows[name] if (metric := metric_of(result.scores[name]))}
        for name in rows
    }


def _rows_of(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every question: the first of the filters through which the harness reads an answer."""
    return [row for row in samples if row.get("filter") == samples[0].get("filter")]


def difference(base: Answers, other: Answers) -> tuple[float, float] | None:
    """Difference of another model's mean from the base's, and its standard error.

    Both answered the same questions, so the error is of the differences question by question, smaller than what the
    errors of two means suggest. ``None`` where a task has fewer than two, or the questions are others.
    """
    differences, errors = list[float](), list[float]()
    for name, ours in base.items():
        theirs = other.get(name, {})
        if len(ours) < 2 or ours.keys() != theirs.keys():
            return None
        changes = [theirs[number] - score for number, score in ours.items()]
        differences.append(statistics.mean(changes))
        errors.append(statistics.stdev(changes) / math.sqrt(len(changes)))
    return (statistics.mean(differences), math.hypot(*errors) / len(errors)) if differences else None


def flips(base: Answers, other: Answers) -> float | None:
    """The share of questions that one of two models gets right and the other wrong, as a mean over tasks (Dutta et al.,
    NeurIPS 2024, arXiv 2407.09141): what was won and what was lost cancel in a mean of scores, and not here. ``None``
    where there are no answers, or the questions are others."""
    changed = list[float]()
    for name, ours in base.items():
        theirs = other.get(name, {})
        if not ours or ours.keys() != theirs.keys():
            return None
        changed.append(statistics.mean(theirs[number] != score for number, score in ours.items()))
    return statistics.mean(changed) if changed else None


def mean_of(scores: Sequence[dict[str, float]], metrics: tuple[str, ...] = MEAN_METRICS) -> float | None:
    """The mean over tasks of the first of some metrics that each has; ``None`` where a task has none of them."""
    values = [score[metric] for score in scores if (metric := metric_of(score, metrics))]
    return sum(values) / len(values) if values and len(values) == len(scores) else None


def metric_of(score: dict[str, float], metrics: tuple[str, ...] = (*MEAN_METRICS, *GENERATED_METRICS)) -> str | None:
    """The first of some metrics that a task has."""
    return next((metric for metric in metrics if metric in score), None)
