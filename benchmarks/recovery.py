"""How much of what pruning cost is won back in 20 minutes of two cores: benchmarks/results/recovery.md and its picture.

    python benchmarks/recovery.py --data data --work /somewhere --out benchmarks/results/recovery

prunes the demo model by every ratio with the default method (C4, 128 x 512 tokens), trains every slim model by every
method for the same CPU time, and measures WikiText-2 at window 512. Time is that of the process on all its cores: 40
core-minutes are 20 minutes of two cores. The number of steps is set beforehand, from a few timed ones, so that the
learning rate can fall to nothing by the end. Settings are chosen on the validation text; `--test` adds the test text.

Finished parts are kept in the work folder and a killed run is gone on with; `--only 0.5:distill` does one alone, so
that several processes can share the work.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import slimgpt
from slimgpt.io.plotting import BLUE, GREEN, GREY, ORANGE, new_figure
from slimgpt.runtime.versions import versions

console = Console()

SHARED: dict[str, Any] = {
    "shares": (9, 1),  # C4, Alpaca
    "pack": True,
    "max_length": 256,
    "batch_size": 2,
    "micro_batch": 2,
    "epochs": 1.0,
    "held_out": 16,
    "evaluations": 8,
    "patience": 0,
    "warmup": 0.1,
}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 16, "rate": 8e-4},
    "lora-paper": {"method": "lora", "rank": 8, "learning_rate": 1e-4},
    "full": {"method": "full", "rate": 3e-4},
    "distill": {"method": "distill", "rate": 3e-4, "layer_weight": 1.0, "layers": 6},
}
"""A ``rate`` times the root of the ratio is the learning rate: the less there is to be won, the smaller the steps."""

COLORS = {"lora": ORANGE, "lora-paper": GREY, "full": GREEN, "distill": BLUE}
TIMED = 12


def main(
    data: Annotated[Path, typer.Option(help="A folder with c4, alpaca and wikitext2.")],
    work: Annotated[Path, typer.Option(help="Where models and finished parts are kept.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    model: str = "demo",
    ratios: str = "0.5,0.2",
    methods: str = "distill,lora",
    only: Annotated[str | None, typer.Option(help="ratio:method,..., these parts alone.")] = None,
    core_minutes: float = 40.0,
    num_samples: int = 128,
    seq_len: int = 512,
    window: int = 512,
    max_tokens: Annotated[int, typer.Option(help="Of the validation and of the test text.")] = 32_768,
    test: Annotated[bool, typer.Option("--test", help="Measure the test text too: once, at the end.")] = False,
) -> None:
    """Prune, train for a given CPU time, measure, write a table."""
    work.mkdir(parents=True, exist_ok=True)
    c4 = data / "c4" / "c4_train_shard0_first1000.jsonl"
    sources = [str(c4), str(data / "alpaca" / "alpaca_data_cleaned.json")]
    texts = {"valid": data / "wikitext2" / "wiki.valid.tokens"}
    if test:
        texts["test"] = data / "wikitext2" / "wiki.test.raw"

    def quality(name: str, source: str) -> dict[str, float]:
        """Perplexities of a model; each text is measured once."""
        file = work / f"{name}.quality.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if missing := [text for text in texts if text not in known]:
            loaded, tokenizer = slimgpt.load(source, dtype="float32")
            for text in missing:
                measured = slimgpt.evaluate(loaded, tokenizer, str(texts[text]), window=window, max_tokens=max_tokens)
                known[text] = measured.perplexity
            file.write_text(json.dumps(known), encoding="utf-8")
        return known

    parts = [
        part.split(":")
        for part in (only.split(",") if only else [f"{r}:{m}" for r in ratios.split(",") for m in methods.split(",")])
    ]
    dense = quality("dense", model)
    console.print(f"dense {dense}")
    rows = []
    for ratio, method in parts:
        slim = work / f"slim-{ratio}"
        if not slim.is_dir():
            slimgpt.prune_folder(
                model,
                slim,
                ratio=float(ratio),
                calibration=str(c4),
                allocation="schedule",
                distill="off",
                num_samples=num_samples,
                seq_len=seq_len,
                resume=True,
            )
        before = quality(slim.name, str(slim))
        target = work / f"{method}-{ratio}"
        settings = dict(METHODS[method])
        if "rate" in settings:
            settings["learning_rate"] = settings.pop("rate") * math.sqrt(float(ratio))
        row = train(slim, target, sources, model, settings, core_minutes)
        after = quality(target.name, str(target))
        row |= {"ratio": float(ratio), "method": method, "before": before, "after": after}
        row["closed"] = {text: closed(dense[text], before[text], after[text]) for text in after}
        rows.append(row)
        console.print({key: value for key, value in row.items() if key != "curve"})
    plan = json.loads((work / f"slim-{parts[0][0]}" / "slimgpt.json").read_text(encoding="utf-8"))["settings"]
    result = {
        "dense": dense,
        "pruning": plan,
        "window": window,
        "max_tokens": max_tokens,
        "core_minutes": core_minutes,
        "threads": torch.get_num_threads(),
        "versions": versions(torch.device("cpu")),
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(result, out.name), encoding="utf-8")
    plot(result, out.with_suffix(".png"))


def closed(dense: float, before: float, after: float) -> float:
    """The share of the gap in log-perplexity that was closed."""
    return math.log(before / after) / math.log(before / dense)


def train(
    slim: Path, target: Path, sources: list[str], teacher: str, settings: dict[str, Any], core_minutes: float
) -> dict[str, Any]:
    """Train for the given CPU time, as nearly as a few timed steps foretell."""
    record = target.with_name(f"{target.name}.train.json")
    if record.is_file() and target.is_dir():
        return json.loads(record.read_text(encoding="utf-8"))
    settings = {**SHARED, **settings} | ({"teacher": teacher} if settings["method"] == "distill" else {})
    draft = target.with_name(f"{target.name}.steps.json")
    if not draft.is_file():
        draft.write_text(json.dumps(planned_steps(slim, target, sources, settings, core_minutes)), encoding="utf-8")
    steps = json.loads(draft.read_text(encoding="utf-8"))
    moments: list[tuple[int, float]] = [(0, 0.0)]
    start = time.process_time()
    recovery = slimgpt.recover(
        slim, target, sources, device="cpu", bf16=True, resume=True, max_steps=steps["steps"], **settings,
        on_step=lambda step: moments.append((step.step, (time.process_time() - start) / 60)),
    )  # fmt: skip
    row = {
        **steps,
        "settings": settings,
        "core_minutes": (time.process_time() - start) / 60,
        "examples": recovery.data["examples"],
        "predicted_tokens": recovery.data["predicted_tokens"],
        "curve": [[dict(moments).get(step), loss] for step, loss in recovery.curve.held_out],
        "kept": recovery.curve.kept,
    }
    record.write_text(json.dumps(row), encoding="utf-8")
    return row


def planned_steps(
    slim: Path, target: Path, sources: list[str], settings: dict[str, Any], core_minutes: float
) -> dict[str, Any]:
    """Steps that fit the time: a few are timed, those of the teacher and the evaluations on their own."""
    probe = target.with_name(f"{target.name}-probe")
    moments: dict[str, list[float]] = {"teacher": [], "step": []}

    def note(part: str) -> None:
        moments[part].append(time.process_time())

    few = {**settings, "epochs": 1.0, "held_out": 0, "evaluations": 1, "max_steps": TIMED}
    start = time.process_time()
    slimgpt.recover(
        slim, probe, sources, device="cpu", bf16=True, overwrite=True, **few,
        on_teacher=lambda *_: note("teacher"), on_step=lambda _: note("step"),
    )  # fmt: skip
    every = moments["step"]
    step = (every[-1] - every[0]) / (len(every) - 1)
    overhead = time.process_time() - start - TIMED * step
    teacher = 0.0
    if len(seen := moments["teacher"]) > 1:
        batch = (seen[-1] - seen[0]) / (len(seen) - 1)
        overhead -= batch * len(seen)
        teacher = batch * settings["batch_size"] / settings["micro_batch"] / settings["epochs"]
    # An evaluation is a forward pass, about a third of a step per example.
    evaluations = (settings["evaluations"] + 1) * step / 3 * settings["held_out"] / settings["batch_size"]
    steps = int((60 * core_minutes - overhead - evaluations) / (step + teacher))
    planned = {"steps": max(steps, 1), "step_seconds": step, "teacher_seconds": teacher, "overhead_seconds": overhead}
    console.print({"part": target.name, **planned})
    return planned


def table(result: dict[str, Any], name: str) -> str:
    """The result as Markdown."""
    texts = list(result["dense"])
    pruning = result["pruning"]
    trios = [f"{text}: {state}" for text in texts for state in ("slim", "recovered", "gap closed")]
    columns = ["removed", "method", "core-minutes", "steps", "windows per step", "epochs", *trios]
    lines = [
        "# Recovery in minutes",
        "",
        f"SmolLM2-135M-Instruct, pruned with `--method {pruning['method']}` on {pruning['num_samples']} x "
        f"{pruning['seq_len']} tokens of C4, then trained on C4 and Alpaca text. Perplexity of the first "
        f"{result['max_tokens']:,} tokens of WikiText-2 at window {result['window']}, fp32; dense "
        + ", ".join(f"{value:.2f} ({text})" for text, value in result["dense"].items())
        + ". A closed gap is the share of the difference in log-perplexity to the dense model. Core-minutes are the "
        "CPU time of the training process, the teacher's pass, evaluations and loading included.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]
    for row in result["rows"]:
        cells = [f"{row['ratio']:.0%}", row["method"], f"{row['core_minutes']:.1f}", str(row["steps"])]
        cells += [f"{row['settings'][name]:g}" for name in ("batch_size", "epochs")]
        for text in texts:
            cells += [f"{row['before'][text]:.2f}", f"{row['after'][text]:.2f}", f"{row['closed'][text]:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"![held-out loss against CPU time]({name}.png)", ""]
    lines += ["Written by `benchmarks/recovery.py`; settings and versions are in the JSON file beside it.", ""]
    return "\n".join(lines)


def plot(result: dict[str, Any], file: Path) -> None:
    """Held-out loss against CPU time, a panel per ratio."""
    ratios = list(dict.fromkeys(row["ratio"] for row in result["rows"]))
    figure, panels = new_figure(4.5 * len(ratios), 4, columns=len(ratios))
    for axes, ratio in zip(panels, ratios):
        for row in result["rows"]:
            points = [point for point in row["curve"] if point[0] is not None]
            if row["ratio"] == ratio:
                marker = "os^D"[list(COLORS).index(row["method"])]
                axes.plot(*zip(*points), marker=marker, markersize=4, label=row["method"], color=COLORS[row["method"]])
        axes.set_title(f"{ratio:.0%} removed")
        axes.set_xlabel("core-minutes")
        axes.set_ylabel("held-out loss per token")
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    typer.run(main)
