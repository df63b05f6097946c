"""Endings of the answers to generated tasks: a loop, or no end at all, which scores of a choice never show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from slimgpt.calibration.repetition import MAX_REPEATED, repeated_share
from slimgpt.models.text_generation import Answer


@dataclass(frozen=True)
class AnswerEndings:
    """Shares of the answers to a task.

    Args:
        answers: how many there are.
        loops: of those that loop: more than :data:`~slimgpt.calibration.repetition.MAX_REPEATED` of their runs of four
            tokens stood in them before.
        unstopped: of those that a limit cut off.
        either: of those that do one or the other.
    """

    answers: int
    loops: float
    unstopped: float
    either: float


def endings_of(answers: Iterable[Answer]) -> AnswerEndings:
    """The shares of some answers, at least one."""
    kinds = [(repeated_share(answer.ids) > MAX_REPEATED, not answer.stopped) for answer in answers]
    count = len(kinds)
    return AnswerEndings(
        answers=count,
        loops=sum(loops for loops, _ in kinds) / count,
        unstopped=sum(unstopped for _, unstopped in kinds) / count,
        either=sum(loops or unstopped for loops, unstopped in kinds) / count,
    )
