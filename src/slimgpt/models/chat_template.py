"""Chat messages as text. A template is a program of the model's authors: it may refuse messages, or never end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimgpt.errors import ChatTemplateError, UsageError, one_line
from slimgpt.runtime.thresholds import thresholds
from slimgpt.runtime.time_limit import time_limit


@contextmanager
def template_errors(subject: str) -> Iterator[None]:
    """Run a chat template inside this: it is stopped after ``template_seconds``
    (:class:`slimgpt.runtime.thresholds.Thresholds`), and what it refuses is one line.

    Args:
        subject: noun phrase for the messages; errors begin with it.

    Raises:
        ChatTemplateError: the template refuses the messages.
        UsageError: it does not end.
    """
    seconds = thresholds().template_seconds
    try:
        with time_limit(seconds):
            yield
    except TimeoutError:
        raise UsageError(
            f"{subject}: the tokenizer's chat template has not ended after {seconds:g} seconds; mend the template, or "
            "give plain text"
        ) from None
    except Exception as error:
        raise ChatTemplateError(
            f"{subject}: the tokenizer's chat template refuses the conversation: {one_line(error)}"
        ) from error


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    subject: str,
    to_be_answered: bool = False,
) -> str:
    """Messages through the tokenizer's chat template.

    It runs in a sandbox, which forbids it files and code, and inside :func:`template_errors`.

    Args:
        subject: noun phrase for the messages; errors begin with it.
        to_be_answered: end where the template lets the assistant begin.

    Raises:
        ChatTemplateError: the template refuses the messages.
        UsageError: it does not end.
    """
    turns = [dict(message) for message in messages]
    with template_errors(subject):
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=to_be_answered))
