"""Seconds of the pruning loop by part, beside the floor and beside one dense forward pass timed in the same run.

    python benchmarks/prune_wallclock.py --calibration c4.jsonl --out benchmarks/results/wallclock
    python benchmarks/prune_wallclock.py --shape llama-7b --num-samples 128 --seq-len 2048 --device cuda --out h100

The first form prunes the demo model on real text, the second a model of random weights whose layers are all the
same tensors' values drawn anew (no download). It writes OUT.json and OUT.md. The floor counts multiplications and
additions: every layer once at the widths that it has when it is run, the two Gram matrices in full, and for the
solver one Cholesky inverse, one Cholesky factor and one product of the output matrix each. See floor.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import slimgpt
from slimgpt.calibration import sample_windows
from slimgpt.config import PruneConfig
from slimgpt.layerwise.capture import capture, run_layer
from slimgpt.layerwise.context import Run
from slimgpt.models.families import ARCHITECTURES
from slimgpt.models.lookup import layer_sizes
from slimgpt.planning import make_plan
from slimgpt.planning.cost import pruning_flops
from slimgpt.pruning.loop import prune_layers
from slimgpt.pruning.memory_estimate import memory_need
from slimgpt.pruning.report import PruneReport, total_seconds
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.devices import DTYPES, as_device
from slimgpt.runtime.memory import choose_placement
from slimgpt.runtime.units import parse_bytes
from slimgpt.runtime.versions import versions

SHAPES = {
    "llama-1b": {"hidden_size": 2048, "layers": 16, "heads": 32, "kv": 8, "ffn": 8192, "vocab": 32000},
    "llama-7b": {"hidden_size": 4096, "layers": 32, "heads": 32, "kv": 32, "ffn": 11008, "vocab": 32000},
}


def random_model(shape: dict[str, int], seq_len: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A Llama of a given shape with random weights, drawn on the device and then in host memory."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        intermediate_size=shape["ffn"],
        vocab_size=shape["vocab"],
        max_position_embeddings=max(seq_len, 2048),
    )
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.cpu().eval()


@torch.no_grad()
def dense_pass(
    model: PreTrainedModel, ids: torch.Tensor, batch_size: int, device: torch.device, dtype: torch.dtype | None
) -> float:
    """Seconds of the decoder layers' forward pass over the tokens, layer by layer as the loop runs them."""
    layers = model.get_submodule(ARCHITECTURES[model.config.model_type].layers)
    assert isinstance(layers, nn.ModuleList)
    stream = capture(model, layers, ids, batch_size, ActivationStore("device", device), dtype)
    seconds = 0.0
    for index, layer in enumerate(layers):
        home = next(layer.parameters())
        kept = home.device, home.dtype
        layer.to(device, dtype)
        synchronize(device)
        start = time.perf_counter()
        for number in range(len(stream)):
            stream.hidden.put(number, run_layer(layer, stream.hidden.get(number), stream.arguments[number][index]))
        synchronize(device)
        seconds += time.perf_counter() - start
        layer.to(*kept)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def passes(
    model: PreTrainedModel, ids: torch.Tensor, config: PruneConfig, run: Run, rounds: int
) -> Iterator[tuple[PruneReport, float, float]]:
    """Rounds of one dense pass and one pruning loop, in turn."""
    plan = make_plan(model.config, config.ratio, config.schedule)
    dense = tuple(layer_sizes(model.config))
    layers = model.get_submodule(ARCHITECTURES[model.config.model_type].layers)
    for _ in range(rounds):
        dense_seconds = dense_pass(model, ids, config.batch_size, run.device, run.dtype)
        start = time.perf_counter()
        done = [f.report for f in prune_layers(model, layers.__getitem__, ids, plan, config, run)]
        seconds = time.perf_counter() - start
        yield (
            PruneReport("", model.config.model_type, config, plan, dense, tuple(done), {}, {}, seconds),
            dense_seconds,
            seconds,
        )


def main(
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    calibration: Annotated[str, typer.Option(help="Text for the demo model.")] = "demo",
    shape: Annotated[str | None, typer.Option(help=f"Random weights instead: {', '.join(SHAPES)}.")] = None,
    layers: Annotated[int | None, typer.Option(help="Only so many layers of the shape.")] = None,
    ratio: float = 0.2,
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 4,
    rounds: Annotated[int, typer.Option(help="The fastest round is reported.")] = 2,
    device: str = "auto",
    dtype: Annotated[str, typer.Option(help="Of random weights.")] = "bfloat16",
    forward_dtypes: Annotated[
        str, typer.Option(help="Of the forward passes; 'stored' leaves the weights'.")
    ] = "stored",
    memory: str | None = None,
) -> None:
    """Time the loop and one dense forward pass."""
    target = as_device(device)
    if shape is None:
        model, tokenizer = slimgpt.load("demo", dtype="float32")
        ids = sample_windows(tokenizer, calibration, num_samples, seq_len)
    else:
        widths = {**SHAPES[shape], **({"layers": layers} if layers else {})}
        model = random_model(widths, seq_len, DTYPES[dtype], target)
        ids = torch.randint(widths["vocab"], (num_samples, seq_len), generator=torch.Generator().manual_seed(0))
    config = PruneConfig(ratio=ratio, num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    results = []
    for name in forward_dtypes.split(","):
        forward = None if name == "stored" else DTYPES[name]
        plan = make_plan(model.config, ratio)
        need = memory_need(model, ids, plan, config, forward, forward is not None or target.type != "cpu")
        placement = choose_placement(need, target, parse_bytes(memory) if memory else None)
        if target.type == "cuda":
            torch.cuda.reset_peak_memory_stats(target)
        report, dense_seconds, seconds = min(
            passes(model, ids, config, Run(target, placement, forward), rounds),
            key=lambda timing: timing[2] / timing[1],
        )
        slim = [layer.sizes for layer in report.layers]
        flops = pruning_flops(model.config, report.dense_sizes, slim, ids.numel(), seq_len)
        by_part = total_seconds(report.layers)
        results.append(
            {
                "model": shape or "SmolLM2-135M-Instruct",
                "layers": model.config.num_hidden_layers,
                "tokens": ids.numel(),
                "ratio": ratio,
                "forward_dtype": name,
                "placement": placement.to_json(),
                "seconds": seconds,
                "dense_seconds": dense_seconds,
                "times_dense_pass": seconds / dense_seconds,
                "seconds_by_part": by_part,
                "floor_tflop": {part: value / 1e12 for part, value in flops.items()},
                "tflop_per_second": {
                    "dense forward": flops["dense forward"] / dense_seconds / 1e12,
                    **{part: flops[part] / by_part[part] / 1e12 for part in ("forward", "hessian", "solver")},
                },
                "peak_gpu_gb": torch.cuda.max_memory_allocated(target) / 1e9 if target.type == "cuda" else None,
            }
        )
    result = {"results": results, "threads": torch.get_num_threads(), "versions": versions(target)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table(result), encoding="utf-8")
    typer.echo(table(result))


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["# Wall clock of pruning", ""]
    for r in result["results"]:
        flops, rate, by_part = r["floor_tflop"], r["tflop_per_second"], r["seconds_by_part"]
        total = flops["forward"] + flops["hessian"] + flops["solver"]
        at_dense_rate = total / rate["dense forward"]
        lines += [
            f"## {r['model']}, {r['tokens']:,} tokens, {r['ratio']:.0%} removed, forward passes {r['forward_dtype']}",
            "",
            f"The loop took {r['seconds']:.1f} s, **{r['times_dense_pass']:.2f} times one dense forward pass** of the "
            f"decoder layers ({r['dense_seconds']:.1f} s in the same run). The floor, all parts at the dense pass's "
            f"rate, would be {at_dense_rate:.1f} s.",
            "",
            "| part | seconds | TFLOP | TFLOP/s |",
            "|---|---|---|---|",
            f"| dense forward pass | {r['dense_seconds']:.1f} | {flops['dense forward']:.2f} "
            f"| {rate['dense forward']:.2f} |",
            *(
                f"| {part} | {by_part[part]:.1f} | {flops[part]:.2f} | {rate[part]:.2f} |"
                for part in ("forward", "hessian", "solver")
            ),
            f"| bringing layers in | {by_part['load']:.1f} | | |",
            f"| whole loop | {r['seconds']:.1f} | {total:.2f} | {total / r['seconds']:.2f} |",
            "",
        ]
    lines.append(
        f"{result['threads']} threads. The Gram matrices are counted in full; only blocks on and above the diagonal "
        "are multiplied, so their rate can pass the machine's."
    )
    lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
