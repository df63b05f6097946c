"""Slim models in llama.cpp beside the dense one: speed, and what bytes and FLOPs promise of it.

    python benchmarks/llama_cpp_speed.py --work /some/disk --out benchmarks/results/llama-cpp-speed

prunes the demo model by magnitude to widths by layer in multiples of 32 (the default), of 256 and of 1, exports them
and the dense model, and times prompts and new tokens of all in turn. Speed does not depend on what the weights are;
nothing is said of quality. Needs llama-cpp-python. A row is one ratio in one type; finished ones are kept in --out's
JSON file, so that a killed run goes on, and `--anew` measures them again.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from ranks import saved

import slimgpt
from slimgpt.models.loading import load_config
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import describe
from slimgpt.models.source import locate
from slimgpt.planning.cost import generation_flops
from slimgpt.runtime.versions import timed_machine, versions

STEPS = (32, 256, 1)
"""Multiples that FFN widths are of: the default, that of K-quants, and odd ones as before there was a default."""

GOAL = 0.85
"""The share of what bytes and FLOPs promise that is to be reached."""


def main(
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    model: str = "demo",
    ratios: str = "0.2,0.5",
    types: str = "F16,Q8_0,Q4_K_M",
    prompt: int = 512,
    new_tokens: int = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds, after one that is not counted.")] = 5,
    threads: int = 1,
    anew: Annotated[bool, typer.Option("--anew", help="Measure rows again that are there.")] = False,
) -> None:
    """Prune, export and time what is missing."""
    work.mkdir(parents=True, exist_ok=True)
    protocol = {"prompt": prompt, "new_tokens": new_tokens, "rounds": rounds, "threads": threads}
    file = out.with_suffix(".json")
    rows: list[dict[str, Any]] = []
    if file.is_file() and not anew:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["protocol"] != protocol:
            raise SystemExit(f"{file} has rows of another protocol; give another --out, or --anew")
        rows = earlier["rows"]
    for quantize in types.split(","):
        for ratio in map(float, ratios.split(",")):
            if any((row["ratio"], row["type"]) == (ratio, quantize) for row in rows):
                continue
            typer.echo(f"{ratio:g} {quantize}")
            folders = {"dense": saved(model, work / "dense")}
            folders |= {f"{step}": slim_folder(work, model, ratio, step) for step in STEPS}
            files = {name: exported(folder, quantize) for name, folder in folders.items()}
            seconds = in_turn(list(files.values()), protocol)
            promises = [promise(folder, prompt, new_tokens) for folder in folders.values()]
            sizes = [each.stat().st_size for each in files.values()]
            for name, (prefill, decode), flops, size in list(zip(files, seconds, promises, sizes))[1:]:
                rows.append(
                    {
                        "ratio": ratio,
                        "type": quantize,
                        "step": int(name),
                        "seconds": {"dense": seconds[0], "slim": (prefill, decode)},
                        "prompt": seconds[0][0] / prefill,
                        "decode": seconds[0][1] / decode,
                        "flops": promises[0] / flops,
                        "bytes": sizes[0] / size,
                    }
                )
            content = {
                "model": locate(model).name,
                "protocol": protocol,
                "engine": f"llama-cpp-python {version('llama-cpp-python')}",
                "machine": {**timed_machine(torch.device("cpu"), torch.float32), "threads": threads},
                "versions": versions(torch.device("cpu")),
                "rows": rows,
            }
            unfinished = file.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            unfinished.rename(file)
            out.with_suffix(".md").write_text(page(content), encoding="utf-8")


def slim_folder(work: Path, model: str, ratio: float, step: int) -> Path:
    """A model with widths of the schedule in multiples of a step, pruned by magnitude: seconds."""
    folder = work / f"slim-{ratio:g}-{step}"
    if not folder.exists():
        cheap = {"method": "magnitude", "repair": False, "distill": "off", "evaluate": False}
        slimgpt.prune_folder(
            model, folder, ratio, torch.arange(64).view(1, 64), round_to=step, device="cpu", num_samples=1,
            seq_len=64, **cheap,
        )  # fmt: skip
    return folder


def exported(folder: Path, quantize: str) -> Path:
    """The GGUF file of a folder."""
    file = folder.with_name(f"{folder.name}-{quantize}.gguf")
    if not file.exists():
        slimgpt.export(folder, file, "gguf", quantize=quantize, check=False)
    return file


def promise(folder: Path, prompt: int, new_tokens: int) -> float:
    """Multiplications and additions per token of a prompt."""
    config = load_config(locate(str(folder)))
    return generation_flops(config, layer_sizes(config), describe(config).parameters, prompt, new_tokens)[0]


def in_turn(files: list[Path], protocol: dict[str, int]) -> list[tuple[float, float]]:
    """Median seconds of a prompt and of a new token of every file, each timed once in every round."""
    from llama_cpp import Llama

    context = protocol["prompt"] + protocol["new_tokens"]
    threads = protocol["threads"]
    models = [
        Llama(str(file), n_ctx=context, n_batch=protocol["prompt"], n_threads=threads, n_threads_batch=threads,
              n_gpu_layers=0, verbose=False)
        for file in files
    ]  # fmt: skip
    taken: list[list[tuple[float, float]]] = [[] for _ in files]
    generator = torch.Generator().manual_seed(0)
    for turn in range(protocol["rounds"] + 1):
        ids = torch.randint(models[0].n_vocab(), (context,), generator=generator).tolist()
        for model, times in zip(models, taken):
            model.reset()
            start = time.perf_counter()
            model.eval(ids[: protocol["prompt"]])
            prefilled = time.perf_counter()
            for token in ids[protocol["prompt"] :]:
                model.eval([token])
            end = time.perf_counter()
            if turn:
                times.append((prefilled - start, (end - prefilled) / protocol["new_tokens"]))
    for model in models:
        model.close()
    return [tuple(statistics.median(part) for part in zip(*times)) for times in taken]  # type: ignore[misc]


def page(content: dict[str, Any]) -> str:
    """The result as Markdown."""
    protocol, machine = content["protocol"], content["machine"]
    lines = [
        f"# {content['model']}, slim, in llama.cpp: how fast",
        "",
        "Widths by layer (the schedule's) beside the dense model, timed in turn: "
        f"{protocol['prompt']} prompt tokens and {protocol['new_tokens']} new ones, medians of {protocol['rounds']} "
        f"rounds, {protocol['threads']} thread(s) of {os.cpu_count()} processors, {machine['processor']}, "
        f"{content['engine']}. A prompt is promised the ratio of FLOPs, a new token that of the files' bytes; the "
        f"share is what was reached of it (goal {GOAL}).",
        "",
        "| removed | type | FFN widths | prompt, times as fast | FLOPs promise | share | decode, times as fast "
        "| bytes promise | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(content["rows"], key=lambda row: (row["ratio"], row["type"], STEPS.index(row["step"]))):
        widths = "single channels" if row["step"] == 1 else f"multiples of {row['step']}"
        lines.append(
            f"| {row['ratio']:.0%} | {row['type']} | {widths} | {row['prompt']:.2f} | {row['flops']:.2f} "
            f"| {row['prompt'] / row['flops']:.2f} | {row['decode']:.2f} | {row['bytes']:.2f} "
            f"| {row['decode'] / row['bytes']:.2f} |"
        )
    made_with = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    return "\n".join([*lines, "", f"Written by `benchmarks/llama_cpp_speed.py` with {made_with}.", ""])


if __name__ == "__main__":
    typer.run(main)
