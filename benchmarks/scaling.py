"""Time, memory and traffic of the default on large models and many GPUs: the page docs/guides/scaling.md.

    python -m benchmarks.scaling --out docs/guides/scaling.md --counts benchmarks/results/scaling.json

Operations, bytes and messages are counted by running the stages on tensors without storage (benchmarks/simulation.py),
with a few layers of each model; the rates are those that the 7B run in benchmarks/results/gpu.json reached. Counts that
are in the JSON file already are not taken again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, PreTrainedConfig

from benchmarks.simulation import STAGES, empty_model_of, make_job, simulate
from slimgpt.config import make_config
from slimgpt.runtime.distributed import Ranks

SAMPLES, SEQ_LEN, RATIO, HELD_OUT = 128, 2048, 0.2, 8
GPUS = (1, 8, 64)
MEASURED = Path("benchmarks/results/gpu.json")


@dataclass(frozen=True)
class Shape:
    """A published model's sizes, and the numbers of layers that are simulated."""

    name: str
    model_type: str
    layers: int
    simulated: tuple[int, int]
    sizes: dict[str, int]

    def config(self, layers: int) -> PreTrainedConfig:
        """The config with so many layers."""
        return AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=layers,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
            **self.sizes,
        )


def dense(name: str, layers: int, *sizes: int) -> Shape:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    return Shape(name, "llama", layers, (2, 3), dict(zip(names, sizes, strict=True)))


REFERENCE = dense("LLaMA-7B", 32, 4096, 11008, 32, 32, 32000)
"""The shape of the run that was measured."""

SHAPES = [
    dense("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256),
    dense("Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256),
    dense("Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128256),
    Shape(
        "Qwen3-30B-A3B",
        "qwen3_moe",
        48,
        (1, 2),
        {
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
            "decoder_sparse_step": 1,
        },
    ),
]

LINK, NETWORK, LATENCY, GPUS_PER_NODE = 150e9, 40e9, 30e-6, 8
"""Assumed: bytes per second of a message within a node and between nodes, and seconds of an empty one."""

Values = dict[str, float]


def counted(shape: Shape, gpus: int, layers: int) -> Values:
    """What the first of some processes does with a model of so many layers."""
    config = make_config(ratio=RATIO, num_samples=SAMPLES, seq_len=SEQ_LEN)
    windows = torch.zeros(SAMPLES, SEQ_LEN, dtype=torch.long)
    model_config = shape.config(layers)
    plan = make_job(empty_model_of(model_config, torch.bfloat16), config, windows).plan
    counts = simulate(model_config, config, windows, Ranks(0, gpus), held_out=HELD_OUT, plan=plan)
    values: Values = {f"operations {stage} {part}": n for (stage, part), n in counts.operations.items()}
    for stage in STAGES:
        values[f"bytes {stage}"] = counts.bytes_of(stage)
        values[f"messages {stage}"] = sum(message.stage == stage for message in counts.messages)
        values[f"peak {stage}"] = counts.peak[stage]
    assert counts.need is not None
    layers_of: Any = empty_model_of(model_config, torch.bfloat16).base_model
    values["layer"] = sum(tensor.nbytes for tensor in layers_of.layers[0].state_dict().values())
    values["least"] = max(counts.need.layer, counts.need.solver)
    values["weights"] = 2 * plan.parameters_before
    return values


def whole(shape: Shape, few: Values, more: Values) -> Values:
    """The counts for all layers, from those for a few and for some more: every layer adds the same."""
    fewer, larger = shape.simulated
    names = few.keys() | more.keys()
    values = {}
    for name in names:
        each = (more.get(name, 0) - few.get(name, 0)) / (larger - fewer)
        values[name] = few.get(name, 0) + each * (shape.layers - fewer)
    for name in ("least", "layer", "peak loop"):  # of one layer, whatever their number
        values[name] = max(few[name], more[name])
    return values


@dataclass(frozen=True)
class Rates:
    """Operations per second by part, as measured with the reference, and bytes of the model per second for the rest."""

    forward: float
    gram: float
    solver: float
    measuring: float
    training: float
    rest: float

    @classmethod
    def of(cls, counts: Values, measured: dict[str, Any]) -> Rates:
        """From the counts and the seconds of the same run."""
        seconds = measured["seconds_by_part"]

        def operations(stage: str, *parts: str) -> float:
            return sum(counts.get(f"operations {stage} {part}", 0) for part in parts)

        forward = operations("loop", "forward") / seconds["forward"]
        solver = operations("loop", "solver") / seconds["solver"]
        solving = operations("measuring", "solver") / solver
        others = operations("teacher", "forward") + operations("comparison", "forward")
        rest = measured["seconds"] - sum(seconds.values()) - others / forward
        return cls(
            forward=forward,
            gram=operations("loop", "gram") / seconds["hessian"],
            solver=solver,
            measuring=operations("measuring", "forward", "gram") / (seconds["allocation"] - solving),
            training=operations("training", "forward") / seconds["distillation"],
            rest=counts["weights"] / rest,
        )


def seconds(counts: Values, rates: Rates, gpus: int) -> Values:
    """Seconds by part."""

    def time(stage: str, part: str, rate: float) -> float:
        return counts.get(f"operations {stage} {part}", 0) / rate

    link = LINK if gpus <= GPUS_PER_NODE else NETWORK
    sent = sum(counts[f"bytes {stage}"] for stage in STAGES)
    messages = sum(counts[f"messages {stage}"] for stage in STAGES)
    return {
        "measuring": time("measuring", "forward", rates.measuring)
        + time("measuring", "gram", rates.measuring)
        + time("measuring", "solver", rates.solver),
        "passes": time("loop", "forward", rates.forward) + time("loop", "gram", rates.gram),
        "solver": time("loop", "solver", rates.solver),
        "training": time("training", "forward", rates.training)
        + time("teacher", "forward", rates.forward)
        + time("comparison", "forward", rates.forward),
        "messages": sent / link + messages * LATENCY if gpus > 1 else 0.0,
        "rest": counts["weights"] / rates.rest,
    }


def main(
    out: Annotated[Path, typer.Option(help="The page to write.")],
    counts: Annotated[Path, typer.Option(help="Where counts are kept.")] = Path("benchmarks/results/scaling.json"),
    only: Annotated[str, typer.Option(help="Count for this model alone; 'nothing': write the page as it is.")] = "",
) -> None:
    """Count what is not counted yet, and write the page."""
    known: dict[str, Values] = json.loads(counts.read_text(encoding="utf-8")) if counts.is_file() else {}
    cases = [(REFERENCE, 1), *((shape, gpus) for shape in SHAPES for gpus in GPUS)]
    for shape, gpus in cases:
        for layers in shape.simulated:
            key = f"{shape.name}, {layers} layers, {gpus} GPUs"
            if key not in known and only in ("", shape.name):
                known[key] = counted(shape, gpus, layers)
                counts.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                typer.echo(key)
    if only in ("", "nothing"):
        out.write_text(page(known), encoding="utf-8")


def is_counted(known: dict[str, Values], shape: Shape, gpus: int) -> bool:
    """Whether a row can be computed."""
    return all(f"{shape.name}, {layers} layers, {gpus} GPUs" in known for layers in shape.simulated)


def missing(known: dict[str, Values]) -> list[str]:
    """What the page says of rows that nobody has counted yet."""
    names = [f"{shape.name} on {gpus}" for shape in SHAPES for gpus in GPUS if not is_counted(known, shape, gpus)]
    return [f"Not counted yet: {', '.join(names)}.", ""] if names else []


def page(known: dict[str, Values]) -> str:
    """The page of all cases."""

    def of(shape: Shape, gpus: int) -> Values:
        few, more = (known[f"{shape.name}, {layers} layers, {gpus} GPUs"] for layers in shape.simulated)
        return whole(shape, few, more)

    measured = next(
        result
        for result in json.loads(MEASURED.read_text(encoding="utf-8"))["results"]
        if "distillation" in result["seconds_by_part"]
    )
    rates = Rates.of(of(REFERENCE, 1), measured)
    rows = [(shape, gpus, of(shape, gpus)) for shape in SHAPES for gpus in GPUS if is_counted(known, shape, gpus)]
    device = measured["versions"]["device"]
    lines = [
        "# How it scales",
        "",
        f"Time, memory and traffic of the default (measuring, pruning, training, comparison) for {RATIO:.0%} of larger models on several GPUs, "
        f"with {SAMPLES} x {SEQ_LEN} given calibration tokens and bf16 weights. **No row of this page was run.** What it is made of:",
        "",
        "- **Counted:** floating-point operations, bytes and messages of the first process. The stages themselves run on tensors without "
        "storage, with two or three layers of each model; every further layer counts the same. Tokens fall to experts in equal parts. On tiny models every "
        "message of such a simulation has the kind and the size that it has in a real run of 2 and of 4 processes "
        "(a slow test of `benchmarks/simulation.py`).",
        f"- **Measured:** the rates of every part, in [one run](../../benchmarks/results/gpu.md) of LLaMA-7B's shape on one {device}: forward passes "
        f"{rates.forward / 1e12:.0f}, Gram matrices {rates.gram / 1e12:.0f}, solver {rates.solver / 1e12:.1f}, measuring without the solver "
        f"{rates.measuring / 1e12:.0f}, training {rates.training / 1e12:.0f} TFLOP/s; files and all the rest {rates.rest / 1e9:.2f} GB of weights per second. Larger matrices are taken to be no faster, and the smaller ones of a mixture's experts no slower, which they are.",
        f"- **Assumed:** {LINK / 1e9:.0f} GB/s for messages within a node of {GPUS_PER_NODE}, {NETWORK / 1e9:.0f} GB/s between nodes, "
        f"{LATENCY * 1e6:.0f} microseconds for each; nothing is hidden behind work.",
        "",
        *missing(known),
        "Text that the model writes itself (`--calibration auto`) comes on top, and wants the whole model on one GPU (layer by layer, and slowly, where that is too small).",
        "",
        "## Time, in seconds",
        "",
        "| model | GPUs | measuring | loop: passes, Gram matrices | loop: solver | training and comparison | messages | files and rest | total |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, gpus, values in rows:
        parts = seconds(values, rates, gpus)
        cells = " | ".join(f"{parts[p]:,.0f}" for p in parts)
        lines.append(f"| {shape.name} | {gpus} | {cells} | {sum(parts.values()):,.0f} |")
    lines += [
        "",
        "- **The solver** of a dense layer runs on the first GPU, in the trial run of the measuring and in the loop, while the others wait. Its work grows with the "
        "cube of the FFN's width and does not depend on the tokens. In a mixture every process solves experts of its own.",
        "- **Measuring** has 8 windows to compare predictions on, so more than 8 processes do not take part.",
        "- **Training** divides the windows of a step, at most 8 of 256 tokens here; further processes only own a share of Adam's moments.",
        "- **Files and rest** is not divided in this table. It was measured where one process reads, checks and writes everything; several check their shares.",
        "",
        "## Memory of the first GPU, in GB",
        "",
        "Peak of all tensors in each stage if everything stays on the GPU, and what the run's own estimate wants for a layer with its solver. Whatever is between "
        f"moves to host memory or files by itself (`--memory`). The measured run had a peak of {measured['peak_device_bytes'] / 1e9:.1f} GB; counted "
        f"are {of(REFERENCE, 1)['peak training'] / 1e9:.1f}.",
        "",
        "| model | GPUs | measuring | loop | training | at least |",
        "|---|---|---|---|---|---|",
    ]
    for shape, gpus, values in rows:
        # The simulation runs a dense layer where it is stored; the device has a copy of it.
        copied = {"measuring": values["layer"], "loop": values["layer"], "training": 0.0}
        peaks = " | ".join(f"{(values[f'peak {stage}'] + copied[stage]) / 1e9:,.1f}" for stage in copied)
        lines.append(f"| {shape.name} | {gpus} | {peaks} | {values['least'] / 1e9:,.1f} |")
    lines += [
        "",
        "The training keeps output matrices in fp32 in every process, and its layers as they run; moments are divided.",
        "",
        "## Traffic of the first process",
        "",
        "Bytes of the tensors that it hands over to collective operations, in GB, and their number.",
        "",
        "| model | GPUs | measuring | loop | training and comparison | messages |",
        "|---|---|---|---|---|---|",
    ]
    for shape, gpus, values in rows:
        if gpus == 1:
            continue
        trained = sum(values[f"bytes {stage}"] for stage in ("teacher", "training", "comparison"))
        messages = sum(values[f"messages {stage}"] for stage in STAGES)
        cells = [values["bytes measuring"], values["bytes loop"], trained]
        sent = " | ".join(f"{value / 1e9:,.1f}" for value in cells)
        lines.append(f"| {shape.name} | {gpus} | {sent} | {messages:,.0f} |")
    lines += [
        "",
        "- Gram matrices are summed up in the process that solves; units and repaired matrices come back.",
        "- A training step sums the gradients of every layer (reduce-scatter, while the layer in front of it runs) and gathers its weights, each about once "
        "the trained parameters in fp32. That is nearly all of the traffic.",
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
        "Written by `benchmarks/scaling.py`; to use other rates, change them there.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
