"""Differences of a slim model from the base with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from slimgpt.comparison.measure import ModelResult
from slimgpt.evaluation.passkey_retrieval import Passkey
from slimgpt.evaluation.perplexity import Perplexity
from slimgpt.evaluation.tasks import MIN_QUESTIONS, Answers, TaskScores, answers, difference, metric_of

SIGNIFICANT = 1.96
"""Standard errors that a difference must exceed to count: 95% of those that arise by chance stay below."""


@dataclass(frozen=True)
class Difference:
    """Difference of a metric of a slim model from the base's.

    Args:
        value: the slim model's minus the base's; of a perplexity the difference of logarithms.
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
    return dict(_recovery(base.tasks, slim.tasks))


def _recovery(base: TaskScores, slim: TaskScores) -> Iterator[tuple[str, Any]]:
    means = {"mean": (base.mean, slim.mean)} if base.mean is not None else {}
    scores = {name: (base.scores[name].get(m), slim.scores[name].get(m)) for name, m in _metrics(base) if m}
    for name, (before, after) in {**scores, **means}.items():
        apart = task_difference(base, slim, None if name == "mean" else name)
        ratio = after / before if before and after is not None else None
        yield name, {"recovery": ratio, "difference": None if apart is None else asdict(apart)}


def _metrics(scores: TaskScores) -> Iterator[tuple[str, str | None]]:
    for name, metrics in scores.scores.items():
        yield name, metric_of(metrics)


def _answers(scores: TaskScores, task: str | None) -> Answers:
    by_task = answers(scores)
    return by_task if task is None else {task: by_task.get(task, {})}
