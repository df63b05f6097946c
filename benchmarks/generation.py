"""What generation loses: scores of a generated task and rates of loops, dense and pruned, in one table.

    python benchmarks/generation.py --data rows --work /some/disk --out benchmarks/results/generation \
        --model "dense=demo" --model "20%=slim-20" --model "33%=slim-33" --model "50%=slim-50"

`rows` is a folder for `slimgpt evaluate --data-dir`. Prompts, answers' limits and scores are lm-evaluation-harness's.
Every answer is kept in `--work` as soon as its batch is written, so that a killed run goes on with the next one; a row
more than before costs that row alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimgpt
from slimgpt.evaluation.harness_tasks import SENTENCES
from slimgpt.evaluation.tasks import GENERATED_METRICS, TaskScores, answers, difference, evaluate_tasks, metric_of
from slimgpt.models.fingerprint import fingerprint, source_files
from slimgpt.models.source import locate
from slimgpt.models.text_generation import Answer, Sampling, generate_answers
from slimgpt.runtime.versions import versions

BATCH = 8

console = Console()


def main(
    data: Annotated[Path, typer.Option(help="A folder of rows, as for `slimgpt evaluate --data-dir`.")],
    work: Annotated[Path, typer.Option(help="A folder where answers are kept.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    model: Annotated[list[str], typer.Option(help="NAME=MODEL; the first is the dense one. May be repeated.")],
    task: Annotated[str, typer.Option(help="One task of lm-evaluation-harness that generates.")] = "ifeval",
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    num_fewshot: int | None = None,
    chat_template: bool = True,
    new_tokens: Annotated[int | None, typer.Option(help="At most so many; else as many as the task says.")] = None,
    batch_size: int = BATCH,
    leave_out_sentences: Annotated[
        bool,
        typer.Option(help="Leave out rows of IFEval that are judged with NLTK's punkt_tab, where that is missing."),
    ] = False,
    note: Annotated[str, typer.Option(help="What the models are; stands above the table.")] = "",
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Write what answers are missing, score them, make the table."""
    work.mkdir(parents=True, exist_ok=True)
    rows, left_out = without_sentences(data, work) if leave_out_sentences and task == "ifeval" else (data, 0)
    result: dict[str, Any] = {
        "settings": {
            "task": task,
            "limit": limit,
            "left_out": left_out,
            "num_fewshot": num_fewshot,
            "chat_template": chat_template,
            "new_tokens": new_tokens,
            "dtype": dtype,
            "note": note,
        },
        "rows": [],
    }
    base = None
    for text in model:
        name, _, place = text.rpartition("=")
        scores, kept = scored(
            place,
            work,
            batch_size,
            new_tokens,
            lambda loaded, tokenizer: evaluate_tasks(
                loaded, tokenizer, [task], limit, num_fewshot, rows, chat_template=chat_template
            ),
            (device, dtype),
        )
        base = base or scores
        result["rows"].append(row_of(name or Path(place).name, task, scores, kept, base))
        result["protocol"] = scores.protocol
        result["versions"] = versions(torch.device("cpu"))
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(page(result), encoding="utf-8")
        console.print(f"{name or place}: done")
    console.print(page(result), markup=False)


def scored(
    place: str,
    work: Path,
    batch_size: int,
    new_tokens: int | None,
    evaluate: Callable[[PreTrainedModel, PreTrainedTokenizerBase], TaskScores],
    loading: tuple[str, str],
) -> tuple[TaskScores, list[Answer]]:
    """The scores of a model, and its answers.

    Args:
        evaluate: scores a loaded model.
        loading: device and dtype.
    """
    device, dtype = loading
    loaded, tokenizer = slimgpt.load(place, dtype, device)
    identity = [fingerprint(source_files(locate(place))), dtype, slimgpt.__version__]
    file = work / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.jsonl"
    kept = KeptAnswers(file, batch_size, new_tokens)
    with mock.patch("slimgpt.evaluation.harness.generate_answers", kept):
        return evaluate(loaded, tokenizer), kept.given


class KeptAnswers:
    """In place of `generate_answers`: answers that a file has are read, others are written and added to it by batch.

    Args:
        file: one JSON object a line: the digest of prompt and settings, and the answer.
    """

    def __init__(self, file: Path, batch_size: int, new_tokens: int | None):
        self.file, self.batch_size, self.new_tokens = file, batch_size, new_tokens
        self.given: list[Answer] = []
        self.known: dict[str, Answer] = {}
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a killed run left half a line
            file.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            values = json.loads(line)
            self.known[values["key"]] = Answer(tuple(values["ids"]), values["text"], values["stopped"])

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        on_answers: Callable[[int], None] | None = None,  # noqa: ARG002
    ) -> list[Answer]:
        """The answers in the order of the prompts."""
        if sampling.temperature:
            raise SystemExit("a task that samples is not one answer a prompt; take another")
        if self.new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=min(self.new_tokens, sampling.max_new_tokens))
        settings = [asdict(sampling), list(stop)]
        keys = [hashlib.sha256(json.dumps([list(ids), settings]).encode()).hexdigest() for ids in prompts]
        missing = list({key: number for number, key in enumerate(keys) if key not in self.known}.values())
        missing.sort(key=lambda number: len(prompts[number]), reverse=True)
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            written = generate_answers(
                model, tokenizer, [prompts[n] for n in batch], sampling, stop=stop, batch_size=self.batch_size
            )
            with self.file.open("a", encoding="utf-8") as lines:
                for number, answer in zip(batch, written):
                    self.known[keys[number]] = answer
                    lines.write(json.dumps({"key": keys[number], **asdict(answer)}) + "\n")
            console.print(f"{self.file.name}: {start + len(batch)} of {len(missing)} answers", markup=False)
        self.given = [self.known[key] for key in keys]
        return self.given


def without_sentences(data: Path, work: Path) -> tuple[Path, int]:
    """A folder with the rows of IFEval that need no NLTK model, and how many were left out."""
    (file,) = (data / "ifeval").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [row for row in rows if not any(name in SENTENCES for name in row["instruction_id_list"])]
    folder = work / "rows" / "ifeval"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return work / "rows", len(rows) - len(kept)


def row_of(name: str, task: str, scores: TaskScores, kept: list[Answer], base: TaskScores) -> dict[str, Any]:
    """The figures of a model, and its difference from the dense one on the same questions."""
    metrics, endings = scores.scores[task], scores.endings[task]
    apart = difference(answers(base), answers(scores)) if base is not scores else None
    return {
        "name": name,
        "metrics": metrics,
        "endings": asdict(endings),
        "mean_tokens": fmean(len(answer.ids) for answer in kept),
        "difference": apart and {"value": apart[0], "stderr": apart[1]},
    }


def page(result: dict[str, Any]) -> str:
    """The table as Markdown."""
    settings, rows = result["settings"], result["rows"]
    first = rows[0]["metrics"]
    main_metric = metric_of(first) or GENERATED_METRICS[0]
    others = [name for name in first if name not in (main_metric, "rows") and not name.endswith("_stderr")]
    template = "through" if settings["chat_template"] else "without"
    cut = "" if settings["new_tokens"] is None else f", answers of at most {settings['new_tokens']} tokens"
    left = f" ({settings['left_out']} rows left out that are judged with NLTK's model)" if settings["left_out"] else ""
    lines = [
        f"# Generated answers: {settings['task']}",
        "",
        *([settings["note"], ""] if settings.get("note") else []),
        f"{int(first['rows'])} rows{left}, {template} the chat template{cut}, always the most likely token; "
        f"{result['protocol']['harness']}, {result['protocol']['dtype']}. An answer loops where more than a quarter of "
        "its runs of four tokens stood in it before; it never stops where a limit cut it. Differences from the first "
        "model are on the same questions, with their standard error. Written by `benchmarks/generation.py`.",
        "",
        f"| model | {main_metric} | difference, points | {' | '.join(others)} | loop | never stop | either | tokens |",
        "|---|---|---|" + "---|" * (len(others) + 4),
    ]
    for row in rows:
        metrics, endings, apart = row["metrics"], row["endings"], row["difference"]
        error = metrics.get(f"{main_metric}_stderr")
        cells = [
            row["name"],
            f"{metrics[main_metric]:.1%}" + ("" if error is None else f" ± {error:.1%}"),
            "" if apart is None else f"{100 * apart['value']:+.1f} ± {100 * apart['stderr']:.1f}",
            *(f"{metrics[name]:.1%}" for name in others),
            *(f"{endings[kind]:.1%}" for kind in ("loops", "unstopped", "either")),
            f"{row['mean_tokens']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
