"""A real model, pruned, in stock llama.cpp beside transformers: the table in benchmarks/results/engines.md.

    python benchmarks/engines.py --text wiki.test.raw --work /some/disk --out benchmarks/results/engines \
        [--converter llama.cpp/convert_hf_to_gguf.py]

prunes the demo model by 30%, once with widths by layer and once with equal ones, exports both, and compares
perplexity, greedy continuations and the chat template. With llama.cpp's own converter at hand (it comes in the sdist
of llama-cpp-python), the uniform folder goes through that as well. Needs llama-cpp-python. `--only converter` makes one
row again and keeps the others of the last run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import slimgpt
from slimgpt.runtime.versions import versions


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
    only: Annotated[str, typer.Option(help="Only rows with this in their name; others stay as they were.")] = "",
) -> None:
    """Prune, export, compare."""
    earlier = out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(earlier.read_text(encoding="utf-8"))["rows"] if only else []
    options = {"num_samples": num_samples, "seq_len": seq_len, "calibration": calibration, "device": "cpu"}

    def compare(name: str, slim: Path, make: Callable[[], Path]) -> None:
        if only not in name:
            return
        path = make()
        size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
        verification = slimgpt.verify(path, slim, text=str(text), max_tokens=max_tokens, window=window)
        rows[:] = [row for row in rows if row["name"] != name]
        rows.append({"name": name, "bytes": size, **verification.to_json()})
        typer.echo(json.dumps(rows[-1]))
        out.with_suffix(".json").write_text(json.dumps(result(), indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(table(result()), encoding="utf-8")

    def exported(slim: Path, name: str, to: str, **more: Any) -> Path:
        return slimgpt.export(slim, work / name, to, overwrite=True, check=False, **more).path

    def result() -> dict[str, Any]:
        return {
            "model": "SmolLM2-135M-Instruct",
            "ratio": ratio,
            "text": text.name,
            "rows": rows,
            "versions": versions(torch.device("cpu")),
        }

    per_layer, uniform = work / "per-layer", work / "uniform"
    if not per_layer.exists() and (not only or only in "widths by layer"):
        slimgpt.prune_folder("demo", per_layer, ratio, **options)
    if not uniform.exists():
        slimgpt.prune_folder("demo", uniform, ratio, uniform=True, round_to=32, **options)
    for quantize in ("F32", "F16", "Q8_0"):
        file = f"per-layer-{quantize}.gguf"
        compare(
            f"widths by layer, GGUF {quantize}",
            per_layer,
            lambda file=file, quantize=quantize: exported(per_layer, file, "gguf", quantize=quantize),
        )
    compare("equal widths, GGUF F32", uniform, lambda: exported(uniform, "uniform-F32.gguf", "gguf", quantize="F32"))
    compare("equal widths, stock class, no flag", uniform, lambda: exported(uniform, "uniform-stock", "hf-uniform"))
    compare("widths by layer, padded, stock class", per_layer, lambda: exported(per_layer, "padded", "padded"))

    def convert() -> Path:
        file = work / "uniform-converted.gguf"
        words = [sys.executable, str(converter), str(uniform), "--outfile", str(file), "--outtype", "f32"]
        subprocess.run(words, check=True)
        return file

    if converter is not None:
        compare("equal widths, llama.cpp's own converter, F32", uniform, convert)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = result["rows"]
    lines = [
        f"# {result['model']}, {result['ratio']:.0%} removed, in other engines",
        "",
        f"Perplexity on the first {rows[0]['tokens']:,} predicted tokens of `{result['text']}` at window "
        f"{rows[0]['window']}, the same token ids in both engines; five greedy continuations of 16 tokens. Compare "
        "within a row: a row made with `--only` is of a model pruned in another run. Written by "
        "`benchmarks/engines.py`.",
        "",
        "| form | bytes | engine | perplexity | slim folder | difference | logits differ by | continuations "
        "| chat template |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    template = {None: "none", True: "the same", False: "different"}
    for r in rows:
        lines.append(
            f"| {r['name']} | {r['bytes']:,} | {r['engine']} | {r['perplexity']:.4f} | {r['reference']:.4f} "
            f"| {r['difference']:+.4%} | {r['largest']:.2g} | {r['continuations'][0]} of {r['continuations'][1]} "
            f"| {template[r['chat_template']]} |"
        )
    lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
