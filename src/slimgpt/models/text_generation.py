"""Answers of a model to prompts: several at once, each the same as alone.

Prompts of a batch are padded on the left and masked. Which token is drawn is decided by numbers that belong to the
prompt and the seed, so that neither the batch nor other prompts change an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from slimgpt.errors import UsageError
from slimgpt.models.chat_template import render_chat
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.lookup import check_context, check_ids, context_length, text_config
from slimgpt.models.sampling import draw

BATCH = 8
"""Prompts at once."""

LOOKBACK = 2
"""Tokens more than a stop string has that it is looked for in: another split into tokens may begin earlier."""

Prompt = str | Sequence[Mapping[str, str]]
"""A text to go on from, or the messages of a conversation."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Args:
        max_new_tokens: of an answer.
        temperature: 0: always the most likely token.
        top_p: of nucleus sampling (Holtzman et al., arXiv 1904.09751); 1: all tokens.
        seed: of the sampling.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A text written by a model.

    Args:
        ids: its tokens, one that ended it included.
        text: the same without special tokens.
        stopped: whether the model ended it, by an end token or a stop string; else a limit did.
    """

    ids: tuple[int, ...]
    text: str
    stopped: bool


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, of the model's generation config and of its tokenizer."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ids: list[Any] = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({int(i) for i in ids if i is not None})


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The tokens of a text with those that the tokenizer begins texts with, or of messages through the chat template
    up to where the answer begins.

    Raises:
        ChatTemplateError: the template refuses the messages.
        UsageError: it does not end, or a text holds bytes that are no UTF-8.
    """
    for part in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
        if any("\ud800" <= character <= "\udfff" for character in str(part)):  # how Python keeps such bytes
            raise UsageError(f"the prompt {part!a:.60} is no text in UTF-8; give it in UTF-8")
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])  # type: ignore[arg-type]
    text = render_chat(tokenizer, prompt, "the prompt", to_be_answered=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def room_for(model: PreTrainedModel, ids: Sequence[int], max_new_tokens: int) -> int:
    """Largest number of tokens of an answer: ``max_new_tokens``, or what the model's context leaves."""
    longest = context_length(model.config)
    return max_new_tokens if longest is None else min(max_new_tokens, longest - len(ids))


@torch.no_grad()
@in_eval_mode
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    batch_size: int = BATCH,
    streamer: Any = None,
    on_answers: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers to tokenised prompts, in their order.

    Settings of the model's generation config that are not given, such as a repetition penalty, hold.

    Args:
        prompts: the tokens of each, at least one; see :func:`prompt_ids`.
        stop: texts that end an answer; they stay in it.
        batch_size: prompts at once; models that keep a state of their own in place of a cache answer one by one.
        streamer: one of transformers, for a single prompt.
        on_answers: called with the number of answers since the last call.

    Raises:
        UsageError: a prompt leaves no room in the model's context, or has tokens that the model has not.
        NumericalError: predictions that are NaN or infinite, where tokens are drawn.
    """
    for ids in prompts:
        check_context(model.config, "the prompt and its answer", len(ids) + 1)
        check_ids(torch.tensor(ids), text_config(model.config).vocab_size, "the prompt")
    longest = max(room_for(model, ids, sampling.max_new_tokens) for ids in prompts) if sampling.temperature else 0
    uniforms = torch.rand(len(prompts), longest, generator=torch.Generator().manual_seed(sampling.seed))
    size = 1 if getattr(model, "_is_stateful", False) else batch_size
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = _Batch(model, tokenizer, [prompts[row] for row in rows], sampling, stop)
        answers |= zip(rows, batch.answers(uniforms[rows], streamer))
        if on_answers:
            on_answers(len(rows))
    return [answers[number] for number in range(len(prompts))]


class _Batch(StoppingCriteria):
    """Prompts that are answered together; notes where each answer ends."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: Sequence[str],
    ):
        self.model, self.tokenizer, self.prompts, self.sampling = model, tokenizer, prompts, sampling
        self.ends = end_ids(model, tokenizer)
        self.width = max(map(len, prompts))
        self.rooms = [room_for(model, ids, sampling.max_new_tokens) for ids in prompts]
        self.stop = {
            text: len(tokenizer(text, add_special_tokens=False)["input_ids"]) + LOOKBACK  # type: ignore[arg-type]
            for text in stop
            if text
        }
        self.lengths = list(self.rooms)
        self.stopped = [False] * len(prompts)
        self.open = set(range(len(prompts)))

    def answers(self, uniforms: Tensor, streamer: Any) -> list[Answer]:
        """Generate.

        Args:
            uniforms: between 0 and 1, ``(prompts, tokens)``: what is drawn where tokens are.
        """
        pad = self.tokenizer.pad_token_id
        pad = pad if isinstance(pad, int) else self.ends[0] if self.ends else 0
        ids = torch.full((len(self.prompts), self.width), pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, self.width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, self.width - len(prompt) :] = 1
        device = next(self.model.get_input_embeddings().parameters()).device
        draws = [_Draw(self.sampling, uniforms.to(device), self.width)] if self.sampling.temperature else []
        output: Any = self.model.generate(  # type: ignore[operator]
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max(self.rooms),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.ends or None,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList(draws),
            stopping_criteria=StoppingCriteriaList([self]),
            streamer=streamer,
        )
        written = output[:, self.width :].tolist()
        answers = [tuple(tokens[:length]) for tokens, length in zip(written, self.lengths)]
        texts = [str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)) for tokens in answers]
        return [Answer(*parts) for parts in zip(answers, texts, self.stopped)]

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        """The answers that are over, as a mask."""
        new = input_ids[:, self.width :].tolist()
        for row in sorted(self.open):
            ended = new[row][-1] in self.ends or any(
                text in str(self.tokenizer.decode(new[row][-tokens:])) for text, tokens in self.stop.items()
            )
            if ended or len(new[row]) >= self.rooms[row]:
                self.lengths[row], self.stopped[row] = len(new[row]), ended
                self.open.discard(row)
        over = [row not in self.open for row in range(len(self.prompts))]
        return torch.tensor(over, device=input_ids.device)


class _Draw(LogitsProcessor):
    """Leaves the drawn token alone, which is then the most likely one."""

    def __init__(self, sampling: Sampling, uniforms: Tensor, width: int):
        self.uniforms, self.width = uniforms, width
        self.warpers: list[Any] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of which one alone is finite."""
        scores = scores.float()
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        tokens = draw(scores, self.uniforms[:, input_ids.shape[1] - self.width])
        return torch.full_like(scores, float("-inf")).scatter_(-1, tokens[:, None], 0.0)
