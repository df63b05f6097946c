"""Layers without attention beside widths alone, at equal size: the table in benchmarks/results/drop-attention.md.

    python benchmarks/drop_attention.py --work /some/disk --out benchmarks/results/drop-attention --data data

prunes SmolLM2-135M-Instruct and its exact multi-head form with and without `--drop-attention`, and times what came out
in turn with the dense model, new tokens behind a long context. Finished prunings and timings are kept in --work: a
killed run goes on. `--data` is the folder of `benchmarks/quality.py`; without it the demo's text is calibrated on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from quality_table.models import MODELS, bring
from quality_table.texts import Texts

import slimgpt
from slimgpt.evaluation.speed import measure_speed
from slimgpt.models.architecture import HEADS
from slimgpt.models.random_weights import random_model
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.versions import timed_machine, versions

PLANS = {"widths": {}, "drop": {"drop_attention": True}}
TITLES = {"widths": "widths alone", "drop": "`--drop-attention`"}
TEXTS = ("bundled", "held_out")


def main(
    work: Annotated[Path, typer.Option(help="A folder for what is finished.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    data: Annotated[Path | None, typer.Option(help="Folder of texts, as for quality.py.")] = None,
    models: Annotated[str, typer.Option(help=f"Of {', '.join(MODELS)}.")] = "smollm2,smollm2-mha",
    ratios: str = "0.33,0.5",
    num_samples: int = 64,
    seq_len: int = 512,
    context: int = 4096,
    new_tokens: int = 32,
    rounds: int = 3,
) -> None:
    """Prune and time what is missing, write what is known."""
    work.mkdir(parents=True, exist_ok=True)
    settings = {"num_samples": num_samples, "seq_len": seq_len}
    calibration = "demo"
    if data is not None:
        calibration = str(work / "c4-calibration.jsonl")
        lines = (json.dumps({"text": str(document)}) + "\n" for document in Texts(data).documents("c4"))
        Path(calibration).write_text("".join(lines), encoding="utf-8")
    rows: list[dict[str, Any]] = []

    def kept(name: str, make: Callable[[], Any]) -> Any:
        file = work / f"{name}.json"
        if not file.is_file():
            typer.echo(name)
            file.write_text(json.dumps(make()) + "\n", encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    for name in models.split(","):
        for ratio in map(float, ratios.split(",")):
            reports = {}
            for plan, more in PLANS.items():
                values = kept(
                    f"{name}-{ratio:g}-{plan}",
                    lambda name=name, ratio=ratio, more=more: pruned(name, ratio, calibration, {**settings, **more}),
                )
                reports[plan] = PruneReport.from_json(values)
            seconds = kept(
                f"{name}-{ratio:g}-times",
                lambda name=name, reports=reports: times(name, reports, context, new_tokens, rounds),
            )
            for plan, report in reports.items():
                rows.append(
                    {
                        "model": name,
                        "ratio": ratio,
                        "plan": plan,
                        "removed": report.plan.achieved,
                        "without_attention": [i for i, sizes in enumerate(report.plan.layers) if not sizes[HEADS]],
                        "tried": report.allocation.get("tried"),
                        "tried_without_attention": report.allocation.get("tried_without_attention"),
                        "kl": {text: report.divergence[text]["kl"] for text in TEXTS if text in report.divergence},
                        "decode": seconds["dense"] / seconds[plan],
                        "seconds": report.seconds,
                    }
                )
            content = {
                "settings": {**settings, "context": context, "new_tokens": new_tokens, "rounds": rounds},
                "calibration": "C4" if data is not None else calibration,
                "machine": timed_machine(torch.device("cpu"), torch.float32),
                "versions": versions(torch.device("cpu")),
                "rows": rows,
            }
            out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(page(content), encoding="utf-8")


def pruned(name: str, ratio: float, calibration: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of a pruning."""
    model, tokenizer = bring(name, None)
    return slimgpt.prune(model, tokenizer, ratio, calibration, device="cpu", **settings).to_json()


def times(name: str, reports: dict[str, PruneReport], context: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Seconds of a new token behind the context, of the dense model and of both slim ones in turn, random weights."""
    config = bring(name, None)[0].config
    widths = {"dense": reports["widths"].dense_sizes, **{plan: each.plan.layers for plan, each in reports.items()}}
    models = [random_model(config, sizes, torch.device("cpu"), torch.float32) for sizes in widths.values()]
    return {plan: 1 / speed.decode for plan, speed in zip(widths, measure_speed(models, context, new_tokens, rounds))}


def page(content: dict[str, Any]) -> str:
    """The result as Markdown."""
    settings, machine = content["settings"], content["machine"]
    lines = [
        "# Layers without attention",
        "",
        f"Calibrated on {settings['num_samples']} x {settings['seq_len']} tokens of {content['calibration']}; KL "
        "divergence from the dense model in nats per token, with its standard error; new tokens behind "
        f"{settings['context']:,} tokens of context, timed in turn with the dense model ({settings['rounds']} rounds, "
        f"medians) on {machine['processor']}, {machine['threads']} thread(s), float32. One seed.",
        "",
        "| model | removed | plan | layers without attention | KL, bundled text | KL, held-out text "
        "| decode, times as fast |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        figures = [row["kl"].get(text) for text in TEXTS]
        kl = " | ".join("" if each is None else f"{each['mean']:.3f} ± {each['stderr']:.3f}" for each in figures)
        gone = ", ".join(map(str, row["without_attention"])) or "none"
        lines.append(
            f"| {MODELS[row['model']].title} | {row['removed']:.2%} | {TITLES[row['plan']]} | {gone} | {kl} "
            f"| {row['decode']:.2f} |"
        )
    lines += ["", "Tried, by KL on trial (layers without attention):", ""]
    for row in content["rows"]:
        if row["tried"] and row["tried_without_attention"] is not None:
            tried = zip(row["tried"], row["tried_without_attention"])
            curve = ", ".join(f"{kl:.3f} ({len(gone)})" for kl, gone in tried)
            lines.append(f"- {row['model']}, {row['ratio']:.0%}: {curve}")
    made_with = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join([*lines, "", f"Written by `benchmarks/drop_attention.py` with {made_with}.", ""])


if __name__ == "__main__":
    typer.run(main)
