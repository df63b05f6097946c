"""One process beside several, each with one thread: the table in benchmarks/results/ranks.md.

    python benchmarks/ranks.py --work /some/disk --out benchmarks/results/ranks --calibration c4.jsonl

prunes the demo model with 1 and with N Gloo processes, compares kept units and weights, and the seconds of the part
that is divided: forward passes and Gram matrices.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file

from slimgpt.runtime.versions import versions

DIVIDED = ("forward", "hessian")


def main(
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    calibration: str = "demo",
    processes: int = 2,
    num_samples: int = 64,
    seq_len: int = 512,
    ratio: float = 0.2,
) -> None:
    """Run both, one after the other."""
    found = {}
    for count in (1, processes):
        folder = work / f"ranks-{count}"
        shutil.rmtree(folder, ignore_errors=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        words = [sys.executable, *launcher, "-m", "slimgpt", "prune", "demo", str(folder), "--ratio", str(ratio)]
        words += ["--calibration", calibration, "--num-samples", str(num_samples), "--seq-len", str(seq_len)]
        words += ["--device", "cpu", "--allocation", "schedule", "--distill", "off"]  # rank 0 does those alone
        subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        report = json.loads((folder / "slimgpt.json").read_text())
        seconds = {part: sum(layer["seconds"][part] for layer in report["layers"]) for part in (*DIVIDED, "solver")}
        found[count] = {"report": report, "weights": load_file(folder / "model.safetensors"), "seconds": seconds}
    one, many = found[1], found[processes]
    kept = [[layer["kept"] for layer in side["report"]["layers"]] for side in (one, many)]
    differences = {
        name: float((many["weights"][name] - tensor).norm() / tensor.norm()) for name, tensor in one["weights"].items()
    }
    divided = [sum(side["seconds"][part] for part in DIVIDED) for side in (one, many)]
    result = {
        "processes": processes,
        "tokens": num_samples * seq_len,
        "same_kept_units": kept[0] == kept[1],
        "largest_relative_difference": max(differences.values()),
        "seconds": {str(count): side["seconds"] for count, side in found.items()},
        "divided_part": divided[1] / divided[0],
        "loop": many["report"]["seconds"] / one["report"]["seconds"],
        "versions": versions(torch.device("cpu")),
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# {processes} processes beside one",
        "",
        f"SmolLM2-135M-Instruct, {ratio:.0%} removed by the schedule on {num_samples} x {seq_len} tokens, no training, "
        "Gloo, one thread each.",
        "Written by `benchmarks/ranks.py`.",
        "",
        f"| | 1 process | {processes} processes | ratio |",
        "|---|---|---|---|",
        f"| forward passes and Gram matrices, seconds | {divided[0]:.1f} | {divided[1]:.1f} "
        f"| {result['divided_part']:.2f} |",
        f"| whole run with the start | {one['report']['seconds']:.1f} | {many['report']['seconds']:.1f} "
        f"| {result['loop']:.2f} |",
        "",
        f"Kept units {'the same' if result['same_kept_units'] else 'DIFFERENT'}; weights differ by at most "
        f"{result['largest_relative_difference']:.1e} (norm of the difference over the norm, worst tensor).",
        "",
        "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
