"""Texts that a model writes, to be read beside those of another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.lookup import text_config

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
    """What a model wrote.

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
        """What :meth:`to_json` gave."""
        return cls(**values)


@torch.no_grad()
@in_eval_mode
def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int = len(QUESTIONS),
    new_tokens: int = NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Answers to the first :data:`QUESTIONS` through the chat template, or what follows the :data:`OPENINGS` where
    there is none; always the most likely token.

    Args:
        progress: called with 1 after every answer.
    """
    samples = []
    for question, opening in list(zip(QUESTIONS, OPENINGS))[:count]:
        templated = _through_template(tokenizer, question)
        prompt = opening if templated is None else question
        ids = tokenizer(templated or opening, add_special_tokens=templated is None)["input_ids"]
        samples.append(_answer(model, tokenizer, prompt, ids, new_tokens))
        if progress:
            progress(1)
    return samples


def _through_template(tokenizer: PreTrainedTokenizerBase, question: str) -> str | None:
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": question}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError):  # a template for something else
        return None


def _answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int], new_tokens: int
) -> Sample:
    longest = getattr(text_config(model.config), "max_position_embeddings", None)
    room = new_tokens if longest is None else min(new_tokens, longest - len(ids))
    if room < 1 or not ids:
        return Sample(prompt, None, False)
    ends = _end_ids(model, tokenizer)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    given = torch.tensor([list(ids)], device=model.device)
    output: Any = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)  # type: ignore[operator]
    written = output[0, len(ids) :].tolist()
    text = tokenizer.decode(written, skip_special_tokens=True)
    return Sample(prompt, str(text), bool(written) and written[-1] in ends)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ids: list[Any] = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(i) for i in ids if i is not None})
