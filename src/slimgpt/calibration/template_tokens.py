"""The tokens of a chat template around a question and its answer, and those that are no text."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.calibration.batch_generation import TurnTokens
from slimgpt.errors import ChatTemplateError
from slimgpt.models.chat_template import render_chat
from slimgpt.models.lookup import text_config


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> TurnTokens | None:
    """The tokens of the chat template around one question and its answer, its own system prompt among them; ``None``
    without a template, or where it does not put both in unchanged."""
    if not tokenizer.chat_template:
        return None
    question, answer = "questionquestion", "answeranswer"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    try:
        opened = render_chat(tokenizer, turns[:1], "a question", to_be_answered=True)
        whole = render_chat(tokenizer, turns, "a question and its answer")
    except ChatTemplateError:
        return None
    if opened.count(question) != 1 or whole.count(answer) != 1:
        return None
    before, between = opened.split(question)
    parts = (before, between, whole.split(answer)[1])
    ids = [tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) if part else () for part in parts]
    return TurnTokens(*ids) if ids[0] and ids[1] else None


def special_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> frozenset[int]:
    """Every token that is no text: those that end a turn or a text among them."""
    ids = set(tokenizer.all_special_ids)
    ids |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for config in (text_config(model.config), model.generation_config):
        ended = getattr(config, "eos_token_id", None)
        ids |= set(ended if isinstance(ended, list) else [ended])
    vocabulary = text_config(model.config).vocab_size
    return frozenset(number for number in ids if number is not None and number < vocabulary)
