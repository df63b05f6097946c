"""Quantise slim folders and take their perplexity: the table in docs/guides/quantise.md.

    python benchmarks/quantise.py --text wiki.test.raw --slim slim --slim slim-round-64 \
        --out benchmarks/results/quantise.json

Needs torchao and bitsandbytes. Every kind runs in a process of its own; one that fails is reported with its error.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

KINDS = (
    "none",
    "torchao int8 weights",
    "torchao int8 weights and activations",
    "bitsandbytes int8",
    "bitsandbytes nf4",
)


def arguments(kind: str) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for a kind of quantisation."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind.startswith("torchao"):
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
        )

        both = kind.endswith("activations")
        config = Int8DynamicActivationInt8WeightConfig() if both else Int8WeightOnlyConfig()
        return {"quantization_config": TorchAoConfig(config)}
    if kind == "bitsandbytes int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if kind == "bitsandbytes nf4":
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return {"quantization_config": nf4}
    return {}


@torch.no_grad()
def perplexity(folder: str, kind: str, text: str, tokens: int, window: int) -> float:
    """Perplexity of a folder, loaded by transformers alone and quantised."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, device_map="cpu", **arguments(kind)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(Path(text).read_text(encoding="utf-8")[: 10 * tokens], return_tensors="pt").input_ids
    loss = 0.0
    windows = ids[0, :tokens].view(-1, window)
    for part in windows:
        logits = model(part[None]).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, part[1:]))
    return math.exp(loss / len(windows))


def main(
    text: Annotated[Path, typer.Option(help="A text file, such as wiki.test.raw.")],
    slim: Annotated[list[Path], typer.Option(help="A slim folder; may be given several times.")],
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    tokens: int = 4096,
    window: int = 512,
    kind: Annotated[str | None, typer.Option(help="Only this one, in this process.")] = None,
) -> None:
    """Every kind on every folder."""
    if kind is not None:
        typer.echo(json.dumps(perplexity(str(slim[0]), kind, str(text), tokens, window)))
        return
    rows = []
    for folder in slim:
        for name in KINDS:
            words = [sys.executable, __file__, "--text", str(text), "--slim", str(folder), "--kind", name]
            words += ["--tokens", str(tokens), "--window", str(window)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            row: dict[str, Any] = {"folder": folder.name, "kind": name}
            if done.returncode:
                row["error"] = done.stderr.strip().splitlines()[-1]
            else:
                row["perplexity"] = json.loads(done.stdout.strip().splitlines()[-1])
            typer.echo(json.dumps(row))
            rows.append(row)
    if out is not None:
        packages = ("torch", "transformers", "torchao", "bitsandbytes")
        result = {"text": text.name, "tokens": tokens, "window": window, "rows": rows}
        result["versions"] = {name: version(name) for name in packages}
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
