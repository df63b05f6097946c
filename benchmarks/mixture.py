"""Mixtures at equal size: REAP beside our whole experts, channels, schedule and default. benchmarks/results/mixture.md.

    python benchmarks/mixture_from_dense.py --data data --out runs/mixture/model
    python benchmarks/mixture.py --data data --model runs/mixture/model --keep runs/mixture/rows \
        --out benchmarks/results/mixture

The reference removes a share of the routed experts, equally many in every layer, by REAP (arXiv 2510.13999). Every
other row has as many parameters. What is compared is the increase of log-perplexity over the mixture as it was, on
WikiText-2 and on held-out C4. Calibration text is C4 that neither the mixture was trained nor is measured on. Every
finished row is kept in a file; a killed run goes on.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mixture_from_dense import TRAINED_DOCUMENTS
from quality_table.texts import Texts
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import slimgpt
from slimgpt.calibration import cut_windows
from slimgpt.evaluation.perplexity import perplexity
from slimgpt.models.architecture import CHANNELS
from slimgpt.models.families.moe import EXPERTS
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.plan import plan_of_widths
from slimgpt.planning.plan_file import to_toml
from slimgpt.runtime.versions import versions

TEXTS = ("wikitext2", "c4")
PLAIN = {"distill": "off", "evaluate": False}

ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "reap": ("REAP: whole experts, nothing else", "experts", {"method": "reap", **PLAIN}),
    "default": ("ours, default", "params", {"evaluate": False}),
    "schedule": ("ours, schedule, no training", "params", {"allocation": "schedule", **PLAIN}),
    "trained": ("ours, schedule, trained", "params", {"allocation": "schedule", "evaluate": False}),
    "whole": ("ours: the same whole experts' number, scaled", "experts", PLAIN),
    "whole-trained": ("the same, trained", "experts", {"evaluate": False}),
    "channels": ("ours: channels of experts, equally in all layers", "channels", PLAIN),
}
"""What a row is called, what its widths are, and its settings: the same number of whole experts as the reference, the
same number of channels of every expert, or the number of parameters alone."""


def widths(model: PreTrainedModel, share: float, kind: str) -> Any:
    """The plan of a share of the experts, as whole experts or as channels of them, equally in all layers."""
    shape = describe(model.config, model)
    name = EXPERTS if kind == "experts" else CHANNELS
    layers = [{**layer.sizes, name: round((1 - share) * layer.sizes[name])} for layer in shape.layers]
    if kind == "channels":
        layers = [{**layer, name: layer[name] // 8 * 8} for layer in layers]
    return plan_of_widths(shape, layers, "query")


def figures(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Texts, tokens: int) -> dict[str, float]:
    """The perplexity on every text at window 512."""
    return {
        name: perplexity(model, tokenizer, texts.held_out(name, False), window=512, max_tokens=tokens).perplexity
        for name in TEXTS
    }


def calibration(texts: Texts, tokenizer: PreTrainedTokenizerBase, num_samples: int, seq_len: int) -> Tensor:
    """Windows of the documents that the mixture was not trained on."""
    return cut_windows(tokenizer, texts.documents("c4")[TRAINED_DOCUMENTS:], num_samples, seq_len, "c4")


def pruned_row(folder: str, name: str, share: float, windows: Tensor) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """A pruned model, its tokenizer, and what its report says."""
    model, tokenizer = slimgpt.load(folder, dtype="float32")
    _, kind, settings = ROWS[name]
    with tempfile.TemporaryDirectory() as scratch:
        plan = widths(model, share, "experts" if kind == "params" else kind)
        if kind == "params":
            settings = {**settings, "params": plan.parameters}
        else:
            file = Path(scratch) / "plan.toml"
            file.write_text(to_toml(plan, model.config.model_type), encoding="utf-8")
            settings = {**settings, "plan": str(file)}
        start = time.perf_counter()
        report = slimgpt.prune(model, None, calibration=windows, device="cpu", **settings)
    row = {
        "parameters": report.plan.parameters,
        "seconds": time.perf_counter() - start,
        "allocation": report.allocation.get("by", "schedule"),
        "experts": sorted({layer.get(EXPERTS, 0) for layer in report.plan.layers}),
        "plan": [dict(layer) for layer in report.plan.layers],
        "distillation": {k: v for k, v in report.distillation.items() if k != "curve"},
    }
    return model, tokenizer, row


def main(
    data: Annotated[Path, typer.Option(help="A folder with c4 and wikitext2.")],
    model: Annotated[str, typer.Option(help="The mixture.")],
    keep: Annotated[Path, typer.Option(help="Folder of finished rows.")],
    out: Annotated[Path | None, typer.Option(help="Where to write, without a suffix.")] = None,
    rows: str = ",".join(ROWS),
    shares: str = "0.25,0.5",
    num_samples: int = 64,
    seq_len: int = 512,
    max_tokens: int = 8192,
) -> None:
    """Prune and measure what is missing, then write the table."""
    keep.mkdir(parents=True, exist_ok=True)
    texts = Texts(data)
    dense, tokenizer = slimgpt.load("demo", dtype="float32")
    windows = calibration(texts, tokenizer, num_samples, seq_len)
    for name, source in (("dense", dense), ("mixture", None)):
        file = keep / f"{name}.json"
        if not file.is_file():
            loaded = source if source is not None else slimgpt.load(model, dtype="float32")[0]
            row = {"parameters": loaded.num_parameters(), "perplexity": figures(loaded, tokenizer, texts, max_tokens)}
            file.write_text(json.dumps(row), encoding="utf-8")
            print(name, row, flush=True)
    del dense
    for share in shares.split(","):
        for name in rows.split(","):
            file = keep / f"{name}-{share}.json"
            if file.is_file():
                continue
            slim, _, row = pruned_row(model, name, float(share), windows)
            row |= {"share": float(share), "name": name, "perplexity": figures(slim, tokenizer, texts, max_tokens)}
            file.write_text(json.dumps(row), encoding="utf-8")
            print(name, share, row["parameters"], row["perplexity"], f"{row['seconds']:.0f} s", flush=True)
    if out is not None:
        write(keep, out, model, {"calibration": [num_samples, seq_len], "max_tokens": max_tokens, "window": 512})


def write(keep: Path, out: Path, model: str, settings: dict[str, Any]) -> None:
    """The finished rows as JSON and as a table."""
    made = json.loads((Path(model) / "mixture.json").read_text(encoding="utf-8"))
    dense, mixture = (json.loads((keep / f"{name}.json").read_text(encoding="utf-8")) for name in ("dense", "mixture"))
    finished = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(keep.glob("*-*.json"))]
    finished.sort(key=lambda row: (row["share"], list(ROWS).index(row["name"])))
    for row in finished:
        row["increase"] = {t: math.log(row["perplexity"][t] / mixture["perplexity"][t]) for t in TEXTS}
    result = {"mixture": mixture, "dense": dense, "made": made, "rows": finished, **settings}
    result["versions"] = versions(torch.device("cpu"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(result), encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    made, mixture, dense = (result[name] for name in ("made", "mixture", "dense"))
    samples, length = result["calibration"]
    lines = [
        "# Mixtures: REAP and ours at equal size",
        "",
        f"SmolLM2-135M-Instruct, its FFNs split into {made['experts']} experts of {made['width']} channels, "
        f"{made['per_token']} per token, and a shared one of {made['shared_width']} (Qwen2-MoE's class); router and "
        f"experts fitted for {made['wall_minutes']:.0f} minutes of one core ({made['core_minutes']:.0f} core-minutes, "
        f"{made['trained_tokens']:,} tokens of distillation). Perplexity at window {result['window']} on the first "
        f"{result['max_tokens']:,} tokens: "
        + "; ".join(
            f"{t}: dense {dense['perplexity'][t]:.2f}, the mixture {mixture['perplexity'][t]:.2f}" for t in TEXTS
        )
        + f". Calibrated on {samples} x {length} tokens of C4. "
        "The increase is that of the log-perplexity over the mixture's; against REAP: how much smaller it is.",
        "",
        "| of routed experts | method | parameters | "
        + " | ".join(f"{t} | increase | against REAP" for t in TEXTS)
        + " | seconds |",
        f"|{'---|' * (4 + 3 * len(TEXTS))}",
    ]
    reference = {row["share"]: row["increase"] for row in result["rows"] if row["name"] == "reap"}
    for row in result["rows"]:
        cells = [f"{row['share']:.0%}", ROWS[row["name"]][0], f"{row['parameters'] / 1e6:.2f} M"]
        for text in TEXTS:
            increase = row["increase"][text]
            against = f"{1 - increase / reference[row['share']][text]:.0%}" if row["share"] in reference else "-"
            cells += [f"{row['perplexity'][text]:.2f}", f"{increase:+.3f}", "" if row["name"] == "reap" else against]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    lines += ["", "Written by `benchmarks/mixture.py`; widths, settings and versions are in the JSON file.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
