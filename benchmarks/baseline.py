"""Perplexity of the paper's method and of ours at several sizes: the table in benchmarks/results/baseline.md.

    python benchmarks/baseline.py --calibration c4.jsonl --text wiki.test.raw --out benchmarks/results/baseline

writes benchmarks/results/baseline.json and .md. `--model` takes what `slimgpt prune` takes; `--multi-head` first
repeats every key and value head for each of its query heads, which gives an exact multi-head form of the model.
"""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from quality_table.models import multi_head
from rich.console import Console
from transformers import PreTrainedModel

import slimgpt
from slimgpt.calibration import sample_windows
from slimgpt.pruning.report import total_seconds
from slimgpt.runtime.devices import as_device
from slimgpt.runtime.versions import versions

console = Console()


def main(
    calibration: Annotated[str, typer.Option(help="Calibration text, as for `slimgpt prune`.")],
    text: Annotated[Path, typer.Option(help="Text for perplexity, such as wiki.test.raw.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    model: str = "demo",
    ratios: str = "0.2,0.33,0.5",
    runs: Annotated[str, typer.Option(help="method:head_unit, with commas between.")] = "paper:kv,slimgpt:auto",
    num_samples: int = 128,
    seq_len: int = 512,
    window: int = 512,
    max_tokens: int | None = None,
    multi_head_form: Annotated[bool, typer.Option("--multi-head")] = False,
    device: str = "auto",
    title: str = "SmolLM2-135M-Instruct",
) -> None:
    """Prune a model by several methods to several sizes and take the perplexity of each."""
    target = as_device(device)
    dense, tokenizer = slimgpt.load(model, dtype="float32")
    if multi_head_form:
        dense = multi_head(dense)
    windows = sample_windows(tokenizer, calibration, num_samples, seq_len)

    def quality(candidate: PreTrainedModel) -> float:
        candidate.to(target)
        measured = slimgpt.evaluate(candidate, tokenizer, str(text), window=window, max_tokens=max_tokens)
        return measured.perplexity

    rows = []

    def write() -> None:  # after every row: a long run that is stopped keeps what it has
        result = {
            "model": title,
            "multi_head": multi_head_form,
            "dense": {"parameters": report.plan.parameters_before, "perplexity": base},
            "calibration": {**report.calibration, "source": Path(calibration).name},
            "text": text.name,
            "window": window,
            "max_tokens": max_tokens,
            "versions": versions(torch.device(target)),
            "rows": rows,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(table(result), encoding="utf-8")

    base = quality(copy.deepcopy(dense))
    console.print(f"dense {base:.3f}")
    for ratio in (float(r) for r in ratios.split(",")):
        for run in runs.split(","):
            method, head_unit = run.split(":")
            slim = copy.deepcopy(dense)
            start = time.perf_counter()
            report = slimgpt.prune(
                slim,
                None,
                ratio=ratio,
                calibration=windows,
                method=method,
                head_unit=head_unit,
                allocation="schedule",
                distill="off",
                device=device,
            )
            seconds = time.perf_counter() - start
            row = {
                "ratio": ratio,
                "method": method,
                "head_unit": report.plan.head_unit,
                "achieved": report.plan.achieved,
                "parameters": report.plan.parameters,
                "perplexity": quality(slim),
                "seconds": seconds,
                "seconds_by_part": total_seconds(report.layers),
            }
            rows.append(row)
            console.print(row)
            write()
    console.print(f"wrote {out.with_suffix('.json')} and {out.with_suffix('.md')}")


def table(result: dict) -> str:
    """The result as Markdown."""
    c = result["calibration"]
    extent = f"first {result['max_tokens']:,} tokens" if result["max_tokens"] else "whole text"
    form = ", multi-head form" if result["multi_head"] else ""
    lines = [
        f"# Baseline: {result['model']}{form}",
        "",
        f"Perplexity on `{result['text']}` at window {result['window']} ({extent}, no overlap, fp32), after pruning "
        f"on {c['num_samples']} x {c['seq_len']} tokens of `{c['source']}`; no retraining, widths by the "
        "log_increase schedule. "
        "Written by `benchmarks/baseline.py`; the settings and seconds by part are in the JSON file beside it.",
        "",
        "| removed | method | head unit | achieved | parameters | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
        f"| 0 | dense | | | {result['dense']['parameters']:,} | {result['dense']['perplexity']:.2f} | |",
    ]
    lines += [
        f"| {r['ratio']:.0%} | {r['method']} | {r['head_unit']} | {r['achieved']:.2%} | {r['parameters']:,} "
        f"| {r['perplexity']:.2f} | {r['seconds']:.1f} |"
        for r in result["rows"]
    ]
    lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
