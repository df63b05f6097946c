"""Texts that a model writes, to be read beside those of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import ChatTemplateError
from slimgpt.models.text_generation import Sampling, generate_answers, prompt_ids, room_for

QUESTIONS = (
    "Explain in three sentences why leaves change their colour in autumn.",
    "Write a Python function that returns the second largest number of a list.",
    "A train leaves at 14:35 and arrives at 17:10. How long does it take? Explain your answer step by step.",
    "Give me a recipe for a simple vegetable soup, as a numbered list.",
)
"""What a model with a chat template is asked."""

OPENINGS = (
    "Leaves change their colour in autumn because",
    'def second_largest(numbers):\n    """Return the second largest number of a list."""\n',
    "The train leaves at 14:35 and arrives at 17:10. So the journey takes",
    "Vegetable soup\n\nIngredients:\n",
)
"""What a model without one goes on from."""

NEW_TOKENS = 96
"""The longest answer, in tokens."""


@dataclass(frozen=True)
class Sample:
    """A continuation written by a model.

    Args:
        prompt: the question or the opening, without the template.
        text: the answer; ``None`` where the context has no room for one.
        stopped: whether the model ended it; else it was cut at :data:`NEW_TOKENS` or the end of the context.
    """

    prompt: str
    text: str | None
    stopped: bool

    def to_json(self) -> dict[str, Any]:
        """Plain dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_json`."""
        return cls(**values)


def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int = len(QUESTIONS),
    new_tokens: int = NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Answers to the first :data:`QUESTIONS` through the chat template, or what follows the :data:`OPENINGS` where
    there is none; always the most likely token. All prompts are answered in one batch.

    Args:
        progress: called with the number of answers since the last call.
    """
    prompts, ids = [], []
    for question, opening in list(zip(QUESTIONS, OPENINGS))[:count]:
        templated = _through_template(tokenizer, question)
        prompts.append(opening if templated is None else question)
        ids.append(prompt_ids(tokenizer, opening) if templated is None else templated)
    answerable = [number for number, each in enumerate(ids) if each and room_for(model, each, new_tokens) > 0]
    if progress and len(answerable) < len(ids):
        progress(len(ids) - len(answerable))
    written = generate_answers(
        model, tokenizer, [ids[number] for number in answerable], Sampling(new_tokens), on_answers=progress
    )
    answers = dict(zip(answerable, written))
    return [
        Sample(prompt, answers[number].text, answers[number].stopped)
        if number in answers
        else Sample(prompt, None, stopped=False)
        for number, prompt in enumerate(prompts)
    ]


def _through_template(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int] | None:
    if tokenizer.chat_template is None:
        return None
    try:
        return prompt_ids(tokenizer, [{"role": "user", "content": question}])
    except ChatTemplateError:  # a template for something else
        return None
