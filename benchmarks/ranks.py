"""The default with one process beside several, each with one thread: the table in benchmarks/results/ranks.md.

    python benchmarks/ranks.py --work /some/disk --out benchmarks/results/ranks --keep

prunes the demo model by the default (text that it writes itself, measured widths, training) with 1 and with N Gloo
processes on the same N cores, in turn, and compares the plans, the weights and the seconds of every part: the fastest
of the rounds. With ``--keep`` runs that are in the working folder already are not run again. Fewer than 64 x 512 tokens
are neither measured nor trained on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from slimgpt.runtime.versions import versions

LIMITS = {"whole": 0.62, "measuring": 0.65, "writing": 0.65, "training": 0.65}
"""Shares of one process's seconds that two may take."""

SECONDS_FILE = "seconds.json"


def main(
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    processes: int = 2,
    num_samples: int = 64,
    seq_len: int = 512,
    ratio: float = 0.2,
    rounds: Annotated[int, typer.Option(help="Runs of each, in turn; the fastest count.")] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Do not repeat runs that are in the working folder.")] = False,
) -> None:
    """Run all rounds, one run after the other."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
    shape = f"{num_samples}x{seq_len}-{ratio:g}"
    for number in range(rounds):
        for count, done in runs.items():
            folder = work / f"ranks-{shape}-{count}-{number}"
            words = ["--ratio", str(ratio), "--num-samples", str(num_samples), "--seq-len", str(seq_len)]
            done.append(run(folder, count, words, keep))
    folders = {count: work / f"ranks-{shape}-{count}-0" for count in runs}
    one, many = (json.loads((folder / "slimgpt.json").read_text()) for folder in folders.values())
    weights = [load_file(folder / "model.safetensors") for folder in folders.values()]
    differences = {
        name: float((weights[1][name] - tensor).norm() / tensor.norm()) for name, tensor in weights[0].items()
    }
    fastest = {count: {part: min(each[part] for each in done) for part in done[0]} for count, done in runs.items()}
    ratios = {part: fastest[processes][part] / seconds for part, seconds in fastest[1].items() if seconds}
    result = {
        "processes": processes,
        "tokens": num_samples * seq_len,
        "same_text": one["calibration"]["sha256"] == many["calibration"]["sha256"],
        "same_plan": one["plan"]["layers"] == many["plan"]["layers"],
        "same_kept_units": [layer["kept"] for layer in one["layers"]] == [layer["kept"] for layer in many["layers"]],
        "largest_relative_difference": max(differences.values()),
        "seconds": {str(count): done for count, done in runs.items()},
        "ratios": ratios,
        "limits": LIMITS,
        "load_average": os.getloadavg(),
        "versions": versions(torch.device("cpu")),
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result, fastest, f"{ratio:.0%} removed, {num_samples} x {seq_len} tokens", rounds)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    typer.echo(text)


def run(folder: Path, count: int, words: list[str], keep: bool) -> dict[str, Any]:
    """The seconds of a run, by part."""
    file = folder / SECONDS_FILE
    if keep and file.is_file():
        return json.loads(file.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "slimgpt", "prune", "demo", str(folder), *words, "--device", "cpu"]
    start = time.perf_counter()
    subprocess.run([*command, "--overwrite"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = time.perf_counter() - start
    report = json.loads((folder / "slimgpt.json").read_text())
    seconds = {
        "whole": whole,
        "writing": report["calibration"]["self_written"]["seconds"],
        "measuring": report["allocation"].get("seconds", 0.0),  # none with few tokens
        "training": report["distillation"].get("seconds", 0.0),
        "comparison": report["divergence"].get("seconds", 0.0),
    }
    for part in ("forward", "hessian", "solver"):
        seconds[part] = sum(layer["seconds"][part] for layer in report["layers"])
    file.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def table(result: dict[str, Any], fastest: dict[int, dict[str, float]], given: str, rounds: int) -> str:
    """The page of figures."""
    processes, ratios = result["processes"], result["ratios"]
    lines = [
        f"# The default in {processes} processes beside one",
        "",
        f"SmolLM2-135M-Instruct, default of `slimgpt prune`, {given}, Gloo, one thread each; the faster of {rounds} "
        "rounds in turn.",
        "Written by `benchmarks/ranks.py`.",
        "",
        f"| seconds | 1 process | {processes} processes | ratio | at most |",
        "|---|---|---|---|---|",
        *(
            f"| {part} | {fastest[1][part]:.1f} | {fastest[processes][part]:.1f} | {ratio:.2f} "
            f"| {LIMITS.get(part, '')} |"
            for part, ratio in ratios.items()
        ),
        "",
        f"Text {'the same' if result['same_text'] else 'DIFFERENT'}, plan "
        f"{'the same' if result['same_plan'] else 'DIFFERENT'}, kept units "
        f"{'the same' if result['same_kept_units'] else 'DIFFERENT'}; weights differ by at most "
        f"{result['largest_relative_difference']:.1e} (norm of the difference over the norm, worst tensor). Load "
        f"average at the end {result['load_average'][0]:.1f}.",
        "",
        "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
