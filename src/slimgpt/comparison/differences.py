"""Differences of a slim model from the base with their standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slimgpt.comparison.model_result import ModelResult
from slimgpt.comparison.spread import mean_of_equal
from slimgpt.evaluation.passkey_retrieval import Passkey
from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.tasks import MIN_QUESTIONS, Answers, TaskScores, answers, difference, metric_of

SIGNIFICANT = 1.96
"""Standard errors that a difference must exceed to count: 95% of those that arise by chance stay below."""

Pair = tuple[ModelResult, ModelResult]
"""A run of the base and a run of a slim model with the same seed."""


@dataclass(frozen=True)
class Difference:
    """Difference of a metric of a slim model from the base's.

    Args:
        value: the slim model's minus the base's; of a perplexity the difference of logarithms. Over several runs the
            mean.
        stderr: its standard error; both models answered the same questions or predicted the same tokens, so it is that
            of the differences one by one.
        count: of questions or tokens.
    """

    value: float
    stderr: float
    count: int

    @property
    def significant(self) -> bool:
        """Whether it exceeds what chance makes of it, which of a few questions it never does."""
        return self.count >= MIN_QUESTIONS and abs(self.value) > SIGNIFICANT * self.stderr


def pairs_of(base: ModelResult, slim: ModelResult) -> list[Pair]:
    """Every run of a column with the base's of the same seed."""
    by_seed = {run.seed: run for run in base.runs}
    return [(by_seed[run.seed], run) for run in slim.runs]


def difference_over(
    pairs: Sequence[Pair], of_pair: Callable[[ModelResult, ModelResult], Difference | None]
) -> Difference | None:
    """The mean difference of several runs; ``None`` where a run has none.

    Its standard error is that of one run, as tokens of several may be the same, and, of several models, the standard
    error of their mean beside it: another pruning would be another model.
    """
    each = [of_pair(*pair) for pair in pairs]
    known = [one for one in each if one is not None]
    if len(known) < len(each):
        return None
    values = [one.value for one in known]
    within = mean_of_equal([one.stderr for one in known])
    return Difference(mean_of_equal(values), math.hypot(within, _between(pairs, values)), known[0].count)


def tasks_difference_over(pairs: Sequence[Pair], task: str | None = None) -> Difference | None:
    """The mean difference of a task, or of the mean over all that were asked for, over several runs.

    Its standard error is that of the questions of all runs, of which each counts once, as the mean of the differences
    that it had: with seeds that draw rows there are more of them than in one run. Of several models the standard error
    of their mean stands beside it.
    """
    each = [base.tasks and task_difference(base.tasks, slim.tasks, task) for base, slim in pairs]
    known = [one for one in each if one is not None]
    if len(known) < len(each):
        return None
    if len(known) == 1:
        return known[0]
    values = [one.value for one in known]
    by_task = _changes_by_question(pairs, task)
    within = math.hypot(*(_weighted_error(list(changes.values())) for changes in by_task)) / len(by_task)
    return Difference(
        mean_of_equal(values), math.hypot(within, _between(pairs, values)), sum(len(changes) for changes in by_task)
    )


def _changes_by_question(pairs: Sequence[Pair], task: str | None) -> list[dict[int, list[float]]]:
    """Of every task the differences of every question that was asked in some run."""
    changes: dict[str, dict[int, list[float]]] = {}
    for base, slim in pairs:
        assert base.tasks is not None
        assert slim.tasks is not None
        ours, theirs = _answers(base.tasks, task), _answers(slim.tasks, task)
        for name, questions in ours.items():
            for number, score in questions.items():
                changes.setdefault(name, {}).setdefault(number, []).append(theirs[name][number] - score)
    return list(changes.values())


def _weighted_error(changes: Sequence[Sequence[float]]) -> float:
    """The standard error of the mean of all differences, of which those of a question belong together; of one
    difference a question it is the standard deviation over the root of their number."""
    count = len(changes)
    total = sum(map(len, changes))
    mean = sum(map(sum, changes)) / total
    squares = sum((len(one) / total * (statistics.fmean(one) - mean)) ** 2 for one in changes)
    return math.sqrt(squares * count / (count - 1)) if count > 1 else 0.0


def _between(pairs: Sequence[Pair], values: Sequence[float]) -> float:
    """The standard error of the mean over several models; 0 for one."""
    by_model: dict[str, list[float]] = {}
    for (_, slim), value in zip(pairs, values):
        by_model.setdefault(slim.folder, []).append(value)
    means = [statistics.fmean(one) for one in by_model.values()]
    return statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0


def task_difference(base: TaskScores, slim: TaskScores | None, task: str | None = None) -> Difference | None:
    """The difference of one task, or of the mean over all that were asked for; ``None`` where the questions differ or
    there are none, as of a group."""
    if slim is None:
        return None
    ours, theirs = (_answers(scores, task) for scores in (base, slim))
    apart = difference(ours, theirs) if all(ours.values()) else None
    return None if apart is None else Difference(*apart, sum(len(questions) for questions in ours.values()))


def perplexity_difference(slim: Perplexity) -> Difference | None:
    """The logarithm of the ratio to the base's perplexity; ``None`` where the divergence from it was not measured."""
    divergence = slim.divergence
    if divergence is None:
        return None
    return Difference(divergence.log_perplexity_ratio, divergence.log_perplexity_ratio_stderr, slim.predicted)


def passkey_difference(base: Passkey, slim: Passkey | None, length: int) -> Difference | None:
    """The difference of the shares of numbers that were given back, taken as independent draws."""
    if slim is None:
        return None
    shares = [one.found[length] for one in (base, slim)]
    count = len(base.by_depth[length]) * int(base.protocol["trials"])
    return Difference(shares[1] - shares[0], math.sqrt(sum(p * (1 - p) for p in shares) / count), count)


def recovery(base: ModelResult, slim: ModelResult) -> dict[str, Any] | None:
    """Share of the base's scores that is left, as JSON values: the ratio and the difference of every task and of the
    mean; ``None`` where no tasks were asked."""
    if base.tasks is None or slim.tasks is None:
        return None
    return dict(_recovery(base, slim))


def _recovery(base: ModelResult, slim: ModelResult) -> Iterator[tuple[str, Any]]:
    assert base.tasks is not None
    pairs = pairs_of(base, slim)
    metrics = {name: metric for name, metric in _metrics(base.tasks) if metric}
    for name, metric in metrics.items():
        yield name, _left(pairs, name, lambda run, name=name, metric=metric: run.scores[name].get(metric))
    if base.tasks.mean is not None:
        yield "mean", _left(pairs, None, lambda run: run.mean)


def _left(pairs: Sequence[Pair], task: str | None, score: Callable[[TaskScores], float | None]) -> dict[str, Any]:
    columns = [[None if run.tasks is None else score(run.tasks) for run in of_side] for of_side in zip(*pairs)]
    before, after = (None if None in column else mean_of_equal([v or 0.0 for v in column]) for column in columns)
    apart = tasks_difference_over(pairs, task)
    ratio = after / before if before and after is not None else None
    return {"recovery": ratio, "difference": None if apart is None else asdict(apart)}


def _metrics(scores: TaskScores) -> Iterator[tuple[str, str | None]]:
    for name, metrics in scores.scores.items():
        yield name, metric_of(metrics)


def _answers(scores: TaskScores, task: str | None) -> Answers:
    by_task = answers(scores)
    return by_task if task is None else {task: by_task.get(task, {})}
