"""Models are measured without their dropout, whatever they were doing before."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from transformers import PreTrainedModel

P = ParamSpec("P")
T = TypeVar("T")


def in_eval_mode(
    work: Callable[Concatenate[PreTrainedModel, P], T],
) -> Callable[Concatenate[PreTrainedModel, P], T]:
    """A function whose model is in eval mode while it works, and afterwards in the mode that it was in."""

    @wraps(work)
    def run(model: PreTrainedModel, *args: P.args, **kwargs: P.kwargs) -> T:
        training = model.training
        model.eval()
        try:
            return work(model, *args, **kwargs)
        finally:
            model.train(training)

    return run
