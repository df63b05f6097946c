"""What a scan predicts beside what pruning gives: the table in benchmarks/results/scan.md.

    python benchmarks/scan.py --work /some/disk --out benchmarks/results/scan --calibration c4.jsonl

prunes SmolLM2-135M-Instruct and its exact multi-head form to five sizes each. Three of them are what a scan prunes to;
the losses of the other two are predicted from these and held against what was measured. Finished prunings are kept in
``--work``, so that a killed run goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from quality_table.models import MODELS, bring

import slimgpt
from slimgpt.config import PruneConfig, make_config
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.planner import plan_for
from slimgpt.planning.restriction import restricted
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.versions import versions
from slimgpt.scanning.prediction import LossPredictor, measured_size

POINTS, CHECKED = (0.1, 0.3, 0.55), (0.2, 0.4)
TEXTS = {"bundled": "bundled text", "held_out": "held-out calibration text"}


def main(
    work: Annotated[Path, typer.Option(help="A folder for finished prunings.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    calibration: Annotated[str, typer.Option(help="As for `slimgpt prune`.")] = "demo",
    num_samples: int = 32,
    seq_len: int = 512,
    distill: Annotated[str, typer.Option(help="As for `slimgpt prune`.")] = "auto",
    forms: Annotated[str, typer.Option(help="Names of models, with commas.")] = "smollm2,smollm2-mha",
) -> None:
    """Prune what is missing, predict, compare."""
    work.mkdir(parents=True, exist_ok=True)
    settings = {
        "num_samples": num_samples,
        "seq_len": seq_len,
        "distill": distill,
        "allocation": "sensitivity",
    }
    result = {
        "settings": {**settings, "calibration": Path(calibration).name},
        "versions": versions(torch.device("cpu")),
        "rows": [],
        "seconds": {},
    }
    for form in forms.split(","):
        reports = {}
        for ratio in sorted((*POINTS, *CHECKED)):
            config = make_config(ratio=ratio, **settings)
            reports[ratio] = pruned(work / f"{form}-{ratio:g}.json", form, config, calibration)
            result["seconds"][f"{form} {ratio:g}"] = reports[ratio].seconds
        result["rows"] += compare(form, reports, make_config(**settings))
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(page(result), encoding="utf-8")


def pruned(file: Path, form: str, config: PruneConfig, calibration: str) -> PruneReport:
    """The report of a pruning, run unless it is kept in a file."""
    if file.is_file():
        report = PruneReport.from_json(json.loads(file.read_text(encoding="utf-8")))
        if report.settings != config:
            raise SystemExit(f"{file} was made with other settings; give another --work")
        return report
    model, tokenizer = bring(form, None)
    report = slimgpt.prune(
        model,
        tokenizer,
        config.ratio,
        calibration,
        device="cpu",
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        distill=config.distill,
        allocation=config.allocation,
    )
    file.write_text(json.dumps(report.to_json()), encoding="utf-8")
    return report


def compare(form: str, reports: dict[float, PruneReport], config: PruneConfig) -> list[dict[str, object]]:
    """A row for every size and text: measured, and of the checked sizes predicted from the others."""
    model, _ = bring(form, None)
    shape = restricted(describe(model.config, model), config)
    texts = [name for name in TEXTS if all("kl" in report.divergence.get(name, {}) for report in reports.values())]
    sizes = {ratio: measured_size(report, texts) for ratio, report in reports.items()}
    predictor = LossPredictor([sizes[ratio] for ratio in POINTS], shape, config, model.config)
    rows: list[dict[str, object]] = []
    for ratio, size in sizes.items():
        planned = plan_for(model.config, make_config(ratio=ratio, round_to=config.round_to), shape)
        predicted = predictor.losses(predictor.plan(planned)) if ratio in CHECKED else {}
        for text in texts:
            own, values = size.losses[text], reports[ratio].divergence[text]
            row = {"form": form, "ratio": ratio, "text": text, "kl": own.kl, "stderr": values["kl"]["stderr"]}
            row |= {"same_top": own.same_top}
            if text in predicted:
                row |= {"predicted_kl": predicted[text].kl, "predicted_same_top": predicted[text].same_top}
            rows.append(row)
    return rows


def page(result: dict) -> str:
    """The table as Markdown."""
    settings = result["settings"]
    lines = [
        "# What a scan predicts",
        "",
        f"SmolLM2-135M-Instruct, calibrated on {settings['num_samples']} x {settings['seq_len']} tokens of "
        f"{settings['calibration']}, `--allocation sensitivity --distill {settings['distill']}`; a scan that prunes to "
        f"{', '.join(f'{ratio:.0%}' for ratio in POINTS)} predicts the other sizes, which were pruned to as well. "
        "KL divergence from the dense model in nats per token. Written by `benchmarks/scan.py`.",
        "",
        "| model | text | removed | KL measured | KL predicted | error | same top | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        kl, top, error = "", "", ""
        if "predicted_kl" in row:
            kl, top = f"{row['predicted_kl']:.3f}", f"{row['predicted_same_top']:.1%}"
            error = f"{row['predicted_kl'] / row['kl'] - 1:+.1%}"
        lines.append(
            f"| {MODELS[row['form']].title} | {TEXTS[row['text']]} | {row['ratio']:.0%} | {row['kl']:.3f} ± "
            f"{row['stderr']:.3f} | {kl} | {error} | {row['same_top']:.1%} | {top} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
