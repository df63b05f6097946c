"""lm-evaluation-harness, with a model in memory and, if wanted, with rows from local files. Needs `slimgpt[eval]`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError
from slimgpt.evaluation.answer_endings import endings_of
from slimgpt.evaluation.harness_tasks import build_tasks, code_allowed, drawn_rows, seeded
from slimgpt.evaluation.loglikelihood import log_likelihoods
from slimgpt.models.chat_template import template_errors
from slimgpt.models.text_generation import Answer, Sampling, generate_answers

OnTasksStart = Callable[[int], Callable[[int], None]]

FEWSHOT_SEED = 1234
"""The harness's own seed of the examples before a question."""

SAMPLING = ("do_sample", "temperature", "top_p")
"""What a task may say of how tokens are chosen."""


class Scorer(HFLM):
    """The harness's own model class, except that the context of a question goes through the model once, and that
    answers are written by :func:`slimgpt.models.text_generation.generate_answers`, each ending by itself.

    Args:
        answers: of every task, by its name.
    """

    on_start: OnTasksStart | None = None
    seed: int = 0
    answers: dict[str, list[Answer]]
    if TYPE_CHECKING:  # the harness registers its class with a decorator that hides them
        model: PreTrainedModel
        tokenizer: PreTrainedTokenizerBase
        max_length: int
        max_gen_toks: int
        truncation: bool
        eot_token_id: int
        tok_decode: Callable[..., str]
        tok_batch_encode: Callable[..., Any]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A question through the chat template, as the harness puts it."""
        with template_errors("a question of a task"):
            return super().apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """The answers to requests in their order, cut at the first stop string as the harness cuts them."""
        progress = self.on_start(len(requests)) if self.on_start else None
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
            until = handle_stop_sequences(
                kwargs.pop("until"), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
            )
            contexts = [requests[number].args[0] for number in numbers]
            answers = self._written(contexts, kwargs.pop("max_gen_toks"), until, kwargs, progress)
            for number, answer in zip(numbers, answers):
                self.answers.setdefault(str(requests[number].task_name), []).append(answer)
                texts[number] = postprocess_generated_text(answer.text, stop=until, think_end_token=None)
        return [texts[number] for number in range(len(requests))]

    def _written(
        self,
        contexts: list[str],
        new_tokens: int,
        until: list[str],
        kwargs: dict[str, Any],
        progress: Callable[[int], None] | None,
    ) -> list[Answer]:
        """Answers of one setting.

        Raises:
            UsageError: the answers alone fill the context, or the task asks for a setting that there is none of here.
        """
        room = self.max_length - new_tokens
        if room < 1:
            raise UsageError(f"the task asks for answers of {new_tokens} tokens, and the context has {self.max_length}")
        if other := [name for name in kwargs if name not in SAMPLING]:
            raise UsageError(f"the task asks for {', '.join(other)} when text is generated, which is not supported")
        prompts = [
            self.tok_batch_encode([context], left_truncate_len=room, truncation=self.truncation)[0][0].tolist()
            for context in contexts
        ]
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample") else 0.0
        sampling = Sampling(new_tokens, temperature, float(kwargs.get("top_p", 1.0)), self.seed)
        return generate_answers(self.model, self.tokenizer, prompts, sampling, stop=until, on_answers=progress)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002
        override_bs: int | None = None,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        progress = self.on_start(len(pairs)) if self.on_start else None
        return log_likelihoods(self.model, pairs, self.max_length, progress)


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    on_start: OnTasksStart | None = None,
    *,
    chat_template: bool = False,
    run_code: bool = False,
    seed: int = 0,
    draw_rows: bool = False,
) -> dict[str, Any]:
    """Results of ``lm_eval.simple_evaluate`` for tasks, groups and tags by name, and under ``endings`` by task
    :class:`~slimgpt.evaluation.answer_endings.AnswerEndings` of what was generated, under ``seeded`` what another seed
    changes.

    Args:
        data_dir: rows come from files below it; everything else of a task stays the harness's.
        on_start: told how many requests there are; gives what is called as they are answered.
        chat_template: put questions through the chat template.
        run_code: let tasks run the code that the model writes.
        seed: of sampled tokens and of the examples before a question.
        draw_rows: the seed draws the rows that ``limit`` leaves; else they are the first.

    Raises:
        UsageError: a task is unknown, its rows cannot be had, or it runs code and may not.
    """
    manager, built = build_tasks(tasks, None if draw_rows else limit, num_fewshot, data_dir, run_code)
    drawn = drawn_rows(manager, built, limit, seed) if draw_rows and limit is not None else None
    # Its bars and warnings are not ours.
    with redirect_stderr(io.StringIO()), _without_commit(), _languages_repeatable(), code_allowed(run_code):
        scorer = Scorer(pretrained=model, tokenizer=tokenizer, batch_size=8)  # type: ignore[arg-type]
        scorer.on_start, scorer.seed, scorer.answers = on_start, seed, {}
        results = evaluator.simple_evaluate(
            model=scorer,
            tasks=built,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=None if drawn else limit,
            samples=drawn,
            apply_chat_template=chat_template,
            confirm_run_unsafe_code=run_code,
            fewshot_random_seed=FEWSHOT_SEED + seed,
        )
    assert results is not None  # only the other processes of a distributed run get nothing
    endings = {name: endings_of(answers) for name, answers in scorer.answers.items()}
    return {**results, "endings": endings, "seeded": seeded(manager, built, drawn)}


@contextmanager
def _without_commit() -> Iterator[None]:
    """Keep the harness from asking git for the commit of the current folder: git's complaint that it is none goes past
    ``sys.stderr``, and the answer is of no use here."""
    with mock.patch.object(evaluator, "get_git_commit_hash", return_value=None):
        yield


@contextmanager
def _languages_repeatable() -> Iterator[None]:
    """Let IFEval judge the language of an answer the same every time: without a seed langdetect draws at random."""
    if find_spec("langdetect") is None:  # the task asks for it itself
        yield
        return
    from langdetect import DetectorFactory

    with mock.patch.object(DetectorFactory, "seed", 0):
        yield
