"""A real model, pruned, in stock llama.cpp beside transformers: the table in docs/engines.md.

    python benchmarks/engines.py --text wiki.test.raw --work /some/disk --out docs/engines \
        [--converter llama.cpp/convert_hf_to_gguf.py]

prunes the demo model by 30%, once with widths by layer and once with equal ones, exports both, and compares
perplexity, greedy continuations and the chat template. With llama.cpp's own converter at hand, the uniform folder
goes through that as well. Needs llama-cpp-python.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import slimgpt
from slimgpt.api import versions


def main(
    text: Annotated[Path, typer.Option(help="A text file, such as wiki.test.raw.")],
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    converter: Annotated[Path | None, typer.Option(help="llama.cpp's convert_hf_to_gguf.py.")] = None,
    calibration: str = "demo",
    ratio: float = 0.3,
    num_samples: int = 64,
    seq_len: int = 512,
    max_tokens: int = 20_000,
    window: int = 512,
) -> None:
    """Prune, export, compare."""
    rows: list[dict[str, Any]] = []
    options = {"num_samples": num_samples, "seq_len": seq_len, "calibration": calibration, "device": "cpu"}

    def compare(name: str, path: Path, slim: Path, size: int) -> None:
        found = slimgpt.verify(path, slim, text=str(text), max_tokens=max_tokens, window=window)
        rows.append({"name": name, "bytes": size, **found.to_json()})
        typer.echo(json.dumps(rows[-1]))
        out.with_suffix(".json").write_text(json.dumps(result(), indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(table(result()), encoding="utf-8")

    def result() -> dict[str, Any]:
        return {
            "model": "SmolLM2-135M-Instruct",
            "ratio": ratio,
            "text": text.name,
            "rows": rows,
            "versions": versions(torch.device("cpu")),
        }

    per_layer, uniform = work / "per-layer", work / "uniform"
    if not per_layer.exists():
        slimgpt.prune_folder("demo", per_layer, ratio, **options)
    if not uniform.exists():
        slimgpt.prune_folder("demo", uniform, ratio, uniform=True, round_to=32, **options)
    for quantize in ("F32", "F16", "Q8_0"):
        file = work / f"per-layer-{quantize}.gguf"
        report = slimgpt.export(per_layer, file, "gguf", quantize=quantize, overwrite=True, check=False)
        compare(f"widths by layer, GGUF {quantize}", file, per_layer, report.bytes)
    file = work / "uniform-F32.gguf"
    report = slimgpt.export(uniform, file, "gguf", quantize="F32", overwrite=True, check=False)
    compare("equal widths, GGUF F32", file, uniform, report.bytes)
    report = slimgpt.export(uniform, work / "uniform-stock", "hf-uniform", overwrite=True, check=False)
    compare("equal widths, stock class, no flag", report.path, uniform, report.bytes)
    report = slimgpt.export(per_layer, work / "padded", "padded", overwrite=True, check=False)
    compare("widths by layer, padded, stock class", report.path, per_layer, report.bytes)
    if converter is not None:
        file = work / "uniform-converted.gguf"
        words = [sys.executable, str(converter), str(uniform), "--outfile", str(file), "--outtype", "f32"]
        subprocess.run(words, check=True)
        compare("equal widths, llama.cpp's own converter, F32", file, uniform, file.stat().st_size)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["rows"]
    lines = [
        f"# {result['model']}, {result['ratio']:.0%} removed, in other engines",
        "",
        f"Perplexity on the first {rows[0]['tokens']:,} predicted tokens of `{result['text']}` at window "
        f"{rows[0]['window']}, the same token ids in both engines; five greedy continuations of 16 tokens. Written by "
        "`benchmarks/engines.py`.",
        "",
        "| form | bytes | engine | perplexity | slim folder | difference | continuations | chat template |",
        "|---|---|---|---|---|---|---|---|",
    ]
    template = {None: "none", True: "the same", False: "different"}
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['bytes']:,} | {r['engine']} | {r['perplexity']:.4f} | {r['reference']:.4f} "
            f"| {r['difference']:+.4%} | {r['continuations'][0]} of {r['continuations'][1]} "
            f"| {template[r['chat_template']]} |"
        )
    lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
