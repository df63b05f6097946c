"""lm-evaluation-harness, with a model in memory and, if wanted, with rows from local files. Needs `slimgpt[eval]`."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.errors import UsageError, one_line
from slimgpt.evaluation.answer_endings import endings_of
from slimgpt.evaluation.code_execution import ALLOWED, local_code_eval
from slimgpt.evaluation.loglikelihood import log_likelihoods
from slimgpt.evaluation.task_rows import read_rows
from slimgpt.models.text_generation import Answer, Sampling, generate_answers

OnTasksStart = Callable[[int], Callable[[int], None]]

FOLDERS = {
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "mmlu": "mmlu/default",
    "longbench": "longbench",
    "ifeval": "ifeval",
    "gsm8k": "gsm8k",
    "humaneval": "humaneval",
}
"""Where the harness defines some tasks; reading all of its ten thousand definitions takes half a minute."""


ROW_BY_ROW = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""Tasks that use all of their rows in order, so that the first of them can be cut off before anything else."""


RUN_CODE = ("humaneval", "mbpp")
"""Tasks that run the code that a model writes, by the beginnings of their names."""

SENTENCES = ("change_case:capital_word_frequency", "length_constraints:number_sentences")
"""Instructions of IFEval that are judged with NLTK's model of sentences."""

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
) -> dict[str, Any]:
    """Results of ``lm_eval.simple_evaluate`` for tasks, groups and tags by name, and under ``endings`` by task
    :class:`~slimgpt.evaluation.answer_endings.AnswerEndings` of what was generated.

    Args:
        data_dir: rows come from files below it; everything else of a task stays the harness's.
        on_start: told how many requests there are; gives what is called as they are answered.
        chat_template: put questions through the chat template.
        run_code: let tasks run the code that the model writes.
        seed: of tasks that sample.

    Raises:
        UsageError: a task is unknown, its rows cannot be had, or it runs code and may not.
    """
    manager, built = build_tasks(tasks, limit, num_fewshot, data_dir, run_code)
    with redirect_stderr(io.StringIO()), code_allowed(run_code):  # its bars and warnings are not ours
        scorer = Scorer(pretrained=model, tokenizer=tokenizer, batch_size=8)  # type: ignore[arg-type]
        scorer.on_start, scorer.seed, scorer.answers = on_start, seed, {}
        results = simple_evaluate(
            model=scorer,
            tasks=built,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            confirm_run_unsafe_code=run_code,
        )
    assert results is not None  # only the other processes of a distributed run get nothing
    return {**results, "endings": {name: endings_of(answers) for name, answers in scorer.answers.items()}}


@contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
    """While this lasts, the metric that runs code does so or refuses to, whatever the environment said before."""
    with mock.patch.dict(os.environ, {ALLOWED: "1" if allowed else "0"}):
        yield


@contextmanager
def _code_runs(allowed: bool) -> Iterator[None]:
    """While this lasts, tasks that are built run code with our metric, if they may."""
    with code_allowed(allowed), local_code_eval():
        yield


def build_tasks(
    tasks: Sequence[str],
    limit: int | None = None,
    num_fewshot: int | None = None,
    data_dir: Path | None = None,
    run_code: bool = False,
) -> tuple[TaskManager, list[Any]]:
    """The harness's definitions, and its tasks and groups with their rows; the arguments are those of
    :func:`run_harness`.

    Raises:
        UsageError: a task is unknown, its rows cannot be had, or it runs code and may not.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(tasks)
    for task in tasks:  # before it is built: its module runs code when it is imported
        if task.startswith(RUN_CODE):
            _check_code(task, run_code)
    with redirect_stderr(io.StringIO()), _rows_from(data_dir, num_fewshot, limit), _code_runs(run_code):
        built = [item for task in tasks for item in _build(manager, task, data_dir)]
    for item in built:
        if getattr(item, "UNSAFE_CODE", False):
            _check_code(str(item.config.task), run_code)
        if isinstance(item, ConfigurableTask) and str(item.config.task).startswith("ifeval"):
            _check_sentences(item, limit)
    return manager, built


def _check_code(task: str, run_code: bool) -> None:
    """Refuse a task that runs code.

    Raises:
        UsageError: it was not allowed.
    """
    if not run_code:
        raise UsageError(
            f"task '{task}' runs the code that the model writes, on this machine and as this user; in a container or "
            "a virtual machine, pass --confirm-run-unsafe-code"
        )


def _check_sentences(task: ConfigurableTask, limit: int | None) -> None:
    """Refuse rows of IFEval that cannot be judged here, before answers are written.

    Raises:
        UsageError: NLTK's model of sentences is not there.
    """
    import nltk

    rows: list[Any] = list(task.test_docs() or [])[:limit]
    if not any(name in SENTENCES for row in rows for name in row["instruction_id_list"]):
        return
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UsageError(
            "task 'ifeval' judges sentences with NLTK's punkt_tab, which is not here: python -m nltk.downloader "
            "punkt_tab, or a --limit before the first row that needs it"
        ) from error


def task_manager(tasks: Sequence[str]) -> TaskManager:
    """The harness's definitions: of these tasks where we know their place, else all of them.

    Raises:
        UsageError: a task is unknown.
    """
    root = Path(lm_eval.__file__).parent / "tasks"
    places = {place for task in tasks for name, place in FOLDERS.items() if task == name or task.startswith(f"{name}_")}
    manager = TaskManager(include_defaults=False, include_path=[root / place for place in sorted(places)])
    if any(task not in manager.task_index for task in tasks):
        manager = TaskManager()
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, 5)
        raise UsageError(
            f"task '{unknown[0]}' is unknown to lm-evaluation-harness"
            + (f"; did you mean {', '.join(near)}?" if near else "; `lm_eval ls tasks` lists them")
        )
    return manager


def _build(manager: TaskManager, task: str, data_dir: Path | None) -> list[Any]:
    """The task or group of a name; several for a tag."""
    try:
        loaded = manager.load([task])
    except UsageError:
        raise
    except ImportError as error:
        raise UsageError(f"task '{task}' needs {error.name or one_line(error)}: pip install 'slimgpt[eval]'") from error
    except Exception as error:
        reason = one_line(error)
        if data_dir is None:
            raise
        raise UsageError(
            f"the rows of task '{task}' in {data_dir} do not have the fields that they have on the hub: {reason}"
        ) from error
    group = loaded.get("groups", {}).get(task)
    return [group] if group is not None else list(loaded["tasks"].values())


@contextmanager
def _rows_from(data_dir: Path | None, num_fewshot: int | None, limit: int | None) -> Iterator[None]:
    """While this lasts, tasks take their rows from local files, or say clearly that the hub gave none."""
    original = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: dict[str, Any] | None = None, **rest: Any) -> None:
        config = task.config
        if data_dir is not None:
            splits = _splits(task, num_fewshot)
            task.dataset = read_rows(data_dir, str(config.task), config.dataset_path, config.dataset_name, splits)
            if limit is not None and config.task in ROW_BY_ROW:  # the harness would prepare all, several times
                evaluated = config.test_split or config.validation_split
                task.dataset[evaluated] = task.dataset[evaluated].select(
                    range(min(limit, len(task.dataset[evaluated])))
                )
            return
        try:
            original(task, dataset_kwargs, **rest)
        except Exception as error:
            reason = one_line(error)
            raise UsageError(
                f"cannot fetch the rows of task '{config.task}' from the hub ({reason}); give them with --data-dir"
            ) from error

    with mock.patch.object(ConfigurableTask, "download", download):
        yield


def _splits(task: ConfigurableTask, num_fewshot: int | None) -> dict[str, str]:
    """The splits that a task reads, and what it cannot do without them; nothing for those it can do without."""
    config = task.config
    evaluated = config.test_split or config.validation_split
    examples = task.fewshot_cfg.split or config.training_split or config.validation_split
    shots = num_fewshot if num_fewshot is not None and config.num_fewshot != 0 else config.num_fewshot
    splits = dict.fromkeys(
        name for name in (evaluated, examples, config.training_split, config.validation_split) if name
    )
    purposes = dict.fromkeys(splits, "")
    if examples and shots:
        purposes[examples] = "few-shot examples"
    return purposes | ({evaluated: "questions"} if evaluated else {})
