"""Time and memory of pruning large models on many GPUs, on paper: the page docs/guides/scaling.md.

    python benchmarks/scaling.py --out docs/guides/scaling.md

Nothing here is measured on a GPU. Operations are counted as in floor.md; the rates are assumptions, written into the
page, so that whoever has the machine can put in their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

TOKENS, SEQ_LEN, BATCH = 128 * 2048, 2048, 4
RATIO = 0.2


@dataclass(frozen=True)
class Shape:
    """A published model's sizes."""

    name: str
    layers: int
    h: int
    f: int
    heads: int
    kv: int
    vocab: int
    d: int = 128

    @property
    def a(self) -> int:
        return self.heads * self.d

    @property
    def layer_weights(self) -> int:
        return self.h * (2 * self.a + 2 * self.kv * self.d + 3 * self.f)


SHAPES = [
    Shape("LLaMA-7B", 32, 4096, 11008, 32, 32, 32000),
    Shape("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
    Shape("Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128256),
]


@dataclass(frozen=True)
class Machine:
    """Assumed sustained rates of one GPU and its surroundings."""

    half: float = 400e12
    """bf16 products with fp32 sums, operations per second"""
    single: float = 30e12
    """fp32 factorisations"""
    double: float = 30e12
    """fp64 factorisations, up to 4,096 columns"""
    disk: float = 5e9
    """bytes per second, one node, not cached"""
    bus: float = 40e9
    """bytes per second from host to GPU"""
    link: float = 150e9
    """bytes per second of a sum over GPUs of one node"""
    network: float = 40e9
    """the same between nodes"""
    gpus_per_node: int = 8


def seconds(shape: Shape, gpus: int, m: Machine) -> dict[str, float]:
    """Seconds by part for the whole model."""
    h, a, f = shape.h, shape.a, shape.f
    keep = 1 - RATIO
    inputs = h * (a + 2 * shape.kv * shape.d + 2 * f)
    forward = TOKENS * (2.0 * (inputs + keep * h * (a + f)) + 2.0 * SEQ_LEN * a)
    gram = 2.0 * TOKENS * (a * a * block_share(a) + f * f * block_share(f))
    solver = 0.0
    for n in (a, f):
        work = n**3 + (keep * n) ** 3 / 3 + 2.0 * h * n * n + 2.0 * h * (keep * n) ** 2 + h * n * n * RATIO
        solver += work / (m.double if n <= 4096 else m.single)
    sums = (a * a * (8 if a <= 4096 else 4) + f * f * (8 if f <= 4096 else 4)) if gpus > 1 else 0.0
    link = m.link if gpus <= m.gpus_per_node else m.network
    nodes = -(-gpus // m.gpus_per_node)
    weights = 2.0 * shape.layer_weights
    return {
        "reading": shape.layers * max(weights / m.disk, weights / m.bus) if nodes else 0.0,
        "forward": shape.layers * forward / m.half / gpus,
        "Gram": shape.layers * gram / m.half / gpus,
        "sums over GPUs": shape.layers * 2 * sums / link,
        "solver": shape.layers * solver,
    }


def block_share(n: int, block: int = 512) -> float:
    """The share of a Gram matrix that blocks on and above the diagonal make up."""
    blocks = -(-n // block)
    return (blocks + 1) / (2 * blocks)


def memory(shape: Shape, gpus: int) -> dict[str, float]:
    """Bytes on the busiest GPU."""
    tokens = TOKENS / gpus
    n = max(shape.a, shape.f)
    return {
        "layer": 2.0 * shape.layer_weights * (2 - RATIO),
        "solver": 4.0 * (2 * n * n + RATIO * n * n + 3 * shape.h * n),
        "stream": 2 * 2.0 * tokens * shape.h,
        "kept inputs": 2.0 * tokens * n,
        "one batch": 2.0 * min(BATCH * SEQ_LEN, tokens) * (3 * n + 6 * shape.h),
    }


def main(out: Annotated[Path, typer.Option(help="The page to write.")]) -> None:
    """Write the page."""
    m = Machine()
    lines = [
        "# How it scales, on paper",
        "",
        "Time and memory of pruning 20% of each model on GPUs, with 128 x 2048 calibration tokens and bf16 weights. **Everything on this page "
        "is computed, nothing is measured**; [gpu.md](../../benchmarks/results/gpu.md) has measurements of 7B on one H100 and one H200.",
        "",
        "Operations are counted as in [floor.md](../../benchmarks/floor.md) and divided by assumed rates of an H100-class machine:",
        "",
        "| part | assumed rate |",
        "|---|---|",
        f"| 16-bit products | {m.half / 1e12:.0f} TFLOP/s |",
        f"| factorisations | {m.single / 1e12:.0f} TFLOP/s |",
        f"| reading from disk | {m.disk / 1e9:.0f} GB/s |",
        f"| host to GPU | {m.bus / 1e9:.0f} GB/s |",
        f"| all-reduce within a node of {m.gpus_per_node} | {m.link / 1e9:.0f} GB/s |",
        f"| all-reduce between nodes | {m.network / 1e9:.0f} GB/s |",
        "",
        "To use other rates, change them in `benchmarks/scaling.py` and run it. Counted is the loop of `--method paper`; the "
        "[other parts of the default](#the-default) come on top.",
        "",
        "## Time",
        "",
        "| model | GPUs | reading | forward passes | Gram matrices | all-reduce | solver | total | limited by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for gpus in (1, 8, 64):
            parts = seconds(shape, gpus, m)
            worst = max(parts, key=lambda part: parts[part])
            cells = " | ".join(f"{value:,.0f} s" for value in parts.values())
            lines.append(f"| {shape.name} | {gpus} | {cells} | {sum(parts.values()) / 60:,.1f} min | {worst} |")
    lines += [
        "",
        "- **7B** is limited by forward passes and Gram matrices, which are proportional to the tokens. More GPUs divide them; the "
        "solver remains, which runs on the first GPU while the others wait.",
        "- **70B and 405B** are limited by the solver, whose work grows with the cube of the FFN's width and does not depend on the "
        "tokens. Eight GPUs save a third or less, and 64 hardly more.",
        "- **Reading:** every process reads every layer. Processes of one node share the page cache, so each node reads the disk "
        "once. A slow network disk may dominate.",
        "",
        "## Memory of the busiest GPU, in GB",
        "",
        "| model | GPUs | layer | solver | hidden states | matrix inputs | one batch | all on the GPU | at least |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        for gpus in (1, 8, 64):
            parts = memory(shape, gpus)
            cells = " | ".join(f"{value / 1e9:,.1f}" for value in parts.values())
            least = parts["layer"] + max(parts["solver"], parts["one batch"])
            full = least + parts["stream"] + parts["kept inputs"]
            lines.append(f"| {shape.name} | {gpus} | {cells} | {full / 1e9:,.1f} | {least / 1e9:,.1f} |")
    lines += [
        "",
        "- *Hidden states* are those of all calibration tokens between two layers, *matrix inputs* those of the output matrix in work. If "
        "`--memory` or the GPU is too small for them, they move to host memory or are computed twice. A layer and its solver must fit.",
        "- The Gram matrix and the inverse of 53,248 columns take 11 GB each in fp32, so the solver of the 405B model fits into 80 GB. "
        "The whole model never has to fit anywhere.",
        "- Host memory holds about one layer, and what the GPU has no room for; weights are mapped from their files "
        "([memory.md](../../benchmarks/results/memory.md)).",
        "",
        "## Starting it",
        "",
        "```",
        "torchrun --nproc-per-node 8 -m slimgpt prune MODEL OUT ...",
        "```",
        "",
        "For several nodes add torchrun's `--nnodes` and `--rdzv-endpoint`. Every node needs the model on its disk, and OUT must be on a disk "
        "that all nodes see; otherwise the first process trains and compares with the dense model by itself.",
        "",
        "## The default",
        "",
        "Measuring, training, the comparison and generated text are divided among the processes, too. Their traffic was not measured on GPUs:",
        "",
        "- **Measuring:** one Gram matrix per structure, as in the loop, then one number per structure.",
        "- **Training:** per step and process about twice the trained parameters in fp32 (a reduce-scatter of gradients, which overlaps with the "
        "backward pass of the next layer, and an all-gather of weights). Adam's moments, 4 bytes per trained parameter, are divided among the "
        "processes; the fp32 weights are not. A step has at least two windows of 256 tokens, so more processes than windows gain nothing.",
        "",
    ]
    out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
