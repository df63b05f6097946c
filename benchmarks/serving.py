"""A real model, pruned, in the engines that people serve with: the table in benchmarks/results/serving.md.

    python benchmarks/serving.py --work /some/disk --out benchmarks/results/serving --vllm env/bin/python \
        [--mlx PYTHON] [--llama-cpp PYTHON] [--openvino PYTHON] [--onnxruntime PYTHON]

prunes the demo model with few calibration tokens (what is compared is engines, not quality): widths by layer, equal
ones, and the FFN alone in multiples of 256; exports them; and runs `slimgpt verify --engine` on each form with the
Python of each engine that is named. Folders of the last run in `--work` are taken as they are, and rows of engines that
are not named stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import slimgpt
from slimgpt.exporting import verify_in_engine
from slimgpt.runtime.versions import versions

FFN_WIDTHS = [1536, 1280, 1024, 1280, 1536, 1280] * 5

OPTIONS: dict[str, dict[str, Any]] = {
    "layers": {"ratio": 0.2},
    "uniform": {"ratio": 0.2, "uniform": True, "round_to": 64},
    "ffn": {},
}

EXPORTS = {
    "nemotron": ("ffn", "nemotron-nas", None),
    "padded": ("layers", "padded", None),
    "layers.gguf": ("layers", "gguf", "F32"),
    "layers-openvino": ("layers", "openvino", None),
    "layers-onnx": ("layers", "onnx", None),
}
"""The slim folder, ``--to`` and ``--quantize``, by the name of what comes out."""

NAMES = {
    "layers": "widths by layer",
    "uniform": "equal widths",
    "nemotron": "FFN only, nemotron-nas",
    "padded": "widths by layer, padded",
    "layers.gguf": "widths by layer, GGUF F32",
    "layers-openvino": "widths by layer, OpenVINO",
    "layers-onnx": "widths by layer, ONNX",
}

RUNS = {
    "vllm": ("uniform", "layers", "nemotron", "padded"),
    "mlx": ("uniform", "nemotron", "padded"),
    "llama.cpp": ("layers.gguf",),
    "openvino": ("layers-openvino",),
    "onnxruntime": ("layers-onnx",),
    "transformers": ("layers", "uniform", "padded"),
}


def main(
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    vllm: Annotated[Path | None, typer.Option(help="The Python of each engine.")] = None,
    mlx: Path | None = None,
    llama_cpp: Path | None = None,
    openvino: Path | None = None,
    onnxruntime: Path | None = None,
    transformers: Path | None = None,
) -> None:
    """Prune, export, run in every engine."""
    pythons = {
        "vllm": vllm,
        "mlx": mlx,
        "llama.cpp": llama_cpp,
        "openvino": openvino,
        "onnxruntime": onnxruntime,
        "transformers": transformers,
    }
    earlier = out.with_suffix(".json")
    rows: list[dict[str, Any]] = json.loads(earlier.read_text(encoding="utf-8"))["rows"] if earlier.is_file() else []
    rows = [row for row in rows if pythons[row["in"]] is None]
    for engine, python in pythons.items():
        for form in RUNS[engine] if python is not None else ():
            slim = made(work, EXPORTS[form][0] if form in EXPORTS else form)
            path = exported(work, form) if form in EXPORTS else slim
            result = verify_in_engine(path, slim, engine=engine, python=python, trust_remote_code=True)
            rows.append({"form": NAMES[form], "in": engine, "problem": result.problem(), **result.to_json()})
            typer.echo(json.dumps(rows[-1]))
            content = {
                "model": "SmolLM2-135M-Instruct",
                "rows": rows,
                "versions": versions(torch.device("cpu")),
            }
            earlier.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(table(content), encoding="utf-8")


def made(work: Path, name: str) -> Path:
    """A slim folder, pruned if it is not there."""
    folder = work / name
    if not folder.exists():
        options = dict(OPTIONS[name])
        if name == "ffn":
            layers = (
                f"{{num_attention_heads = 9, num_key_value_heads = 3, intermediate_size = {width}}}"
                for width in FFN_WIDTHS
            )
            plan = work / "ffn.toml"
            plan.write_text('head_unit = "kv"\nlayers = [\n' + ",\n".join(layers) + "\n]\n", encoding="utf-8")
            options["plan"] = str(plan)
        slimgpt.prune_folder("demo", folder, num_samples=8, seq_len=256, distill="off", device="cpu", **options)
    return folder


def exported(work: Path, name: str) -> Path:
    """An exported form, made if it is not there."""
    slim, to, quantize = EXPORTS[name]
    if not (work / name).exists():
        slimgpt.export(made(work, slim), work / name, to, quantize=quantize, check=False)
    return work / name


def table(content: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# {content['model']}, pruned, in other engines",
        "",
        "`slimgpt verify --engine`: log-probabilities of the tokens of five prompts and of a paragraph, in nats, and "
        "five greedy continuations of 16 tokens, in the engine and in transformers, both in float32 on a CPU. Pruned "
        "by 20% (FFN alone: 10%) with 2,048 calibration tokens, so the perplexities say nothing about quality. Written "
        "by `benchmarks/serving.py`.",
        "",
        "| form | engine | with | log-probabilities | at most apart | on average | continuations | tokenizer agrees |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in content["rows"]:
        first, *rest = (f"{name} {version}" for name, version in row["versions"].items())
        prompts = row["prompts"]
        same, ties = sum(p["same"] for p in prompts), sum(p["tie"] for p in prompts)
        own = [p["same_ids"] for p in prompts if p["same_ids"] is not None]
        lines.append(
            f"| {row['form']} | {first} | {', '.join(rest) or '-'} | {row['tokens']} | {row['largest']:.1e} "
            f"| {row['mean']:.1e} | {same} of {len(prompts)}{f', {ties} ties' if ties else ''} "
            f"| {f'{sum(own)} of {len(own)}' if own else '-'} |"
        )
    made_with = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return "\n".join([*lines, "", f"The slim folder's side with {made_with}.", ""])


if __name__ == "__main__":
    typer.run(main)
