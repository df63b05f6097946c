"""Seconds and memory of pruning a model of a given shape with random weights; no download is needed.

    python benchmarks/large.py --shape llama-7b --device cuda --out large.json

The floor counts multiplications and additions: one forward pass through the dense layers, the two Gram matrices,
and, for the solver, one Cholesky inverse and one Cholesky solve per matrix.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

import slimgpt
from slimgpt.api import versions
from slimgpt.models.loading import as_device, as_dtype
from slimgpt.pruning import total_seconds

SHAPES = {
    "llama-1b": {"hidden_size": 2048, "layers": 16, "heads": 32, "kv": 8, "ffn": 8192, "vocab": 32000},
    "llama-7b": {"hidden_size": 4096, "layers": 32, "heads": 32, "kv": 32, "ffn": 11008, "vocab": 32000},
}


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    shape: str = "llama-7b",
    layers: Annotated[int | None, typer.Option(help="Only so many layers.")] = None,
    num_samples: int = 128,
    seq_len: int = 2048,
    ratio: float = 0.2,
    method: str = "slimgpt",
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "bfloat16",
) -> None:
    """Prune a model with random weights and write what it took."""
    s = {**SHAPES[shape], **({"layers": layers} if layers else {})}
    target = as_device(device)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=s["hidden_size"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv"],
        intermediate_size=s["ffn"],
        vocab_size=s["vocab"],
        max_position_embeddings=max(seq_len, 2048),
    )
    torch.manual_seed(0)
    with target:
        model = AutoModelForCausalLM.from_config(config, dtype=as_dtype(dtype)).eval()
    ids = torch.randint(s["vocab"], (num_samples, seq_len), generator=torch.Generator().manual_seed(0))
    cuda = target.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(target)
    start = time.perf_counter()
    report = slimgpt.prune(
        model, None, ratio=ratio, calibration=ids, method=method, batch_size=batch_size, device=str(target)
    )
    seconds = time.perf_counter() - start
    tokens, n, m = num_samples * seq_len, s["hidden_size"], s["ffn"]
    weights = sum(layer.parameters_before for layer in report.layers)
    flops = {
        "forward": 2.0 * weights * tokens,
        "hessian": 2.0 * s["layers"] * tokens * (n * n + m * m),
        "solver": s["layers"] * sum(size**3 * (1 + 1 / 3) + 2.0 * n * size * size for size in (n, m)),
    }
    by_part = total_seconds(report.layers)
    result = {
        "shape": {"name": shape, **s},
        "tokens": tokens,
        "ratio": report.plan.achieved,
        "method": method,
        "dtype": dtype,
        "batch_size": batch_size,
        "seconds": seconds,
        "seconds_by_part": by_part,
        "floor_tflop": {part: value / 1e12 for part, value in flops.items()},
        "tflop_per_second": {part: flops[part] / by_part[part] / 1e12 for part in flops},
        "peak_gb": torch.cuda.max_memory_allocated(target) / 1e9 if cuda else None,
        "versions": versions(target),
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    typer.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    typer.run(main)
