"""Resident memory of a recovery, whole in one process and divided among several: the table in
benchmarks/results/recovery-memory.md.

    python -m benchmarks.recovery_memory --work /some/disk --out benchmarks/results/recovery-memory

A random Llama is trained for a few steps on random text, by one process and by N with ``--shard``. All of
them tell the most memory that they had of their own (anonymous: mapped files are shared), and what they had when Python
had imported everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.ranks import byte_tokenizer, random_text
from slimgpt.runtime.memory import anonymous_rss
from slimgpt.runtime.versions import versions

LIMIT = 0.65
"""Share of one process's memory that each of two may have."""

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32768,
}
MEASURED = "import sys; from benchmarks.recovery_memory import measured; measured(sys.argv[1:])"


def main(
    work: Annotated[Path, typer.Option(help="A folder for the models.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    processes: int = 2,
    methods: Annotated[list[str], typer.Option(help="Recovery methods.")] = ["full", "lora"],  # noqa: B006
) -> None:
    """Run every method in one process and in several."""
    work.mkdir(parents=True, exist_ok=True)
    model, text = work / "model", work / "text.txt"
    if not (model / "config.json").is_file():
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", max_position_embeddings=1024, tie_word_embeddings=True, **SIZES)
        AutoModelForCausalLM.from_config(config).save_pretrained(model)
        byte_tokenizer().save_pretrained(model)
        text.write_text(random_text(2**15), encoding="utf-8")
    results = {method: {count: run(work, model, text, method, count) for count in (1, processes)} for method in methods}
    values = {"sizes": SIZES, "results": results, "limit": LIMIT, "versions": versions(torch.device("cpu"))}
    out.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Memory of a recovery, whole and divided",
        "",
        f"A random model in fp32 ({SIZES['num_hidden_layers']} layers of {SIZES['hidden_size']} / "
        f"{SIZES['intermediate_size']}) on the CPU; anonymous resident memory of the process that has the most, MB. "
        "Written by `benchmarks/recovery_memory.py`.",
        "",
        f"| method | 1 process | {processes} with `--shard` | ratio | ratio beyond imports | at most |",
        "|---|---|---|---|---|---|",
    ]
    for method, each in results.items():
        one, many = each[1], max(each[processes], key=lambda own: own["peak"])
        alone = one[0]
        inner = (many["peak"] - many["start"]) / (alone["peak"] - alone["start"])
        cells = f"{alone['peak'] / 1e6:,.0f} | {many['peak'] / 1e6:,.0f} | {many['peak'] / alone['peak']:.2f}"
        lines.append(f"| {method} | {cells} | {inner:.2f} | {LIMIT} |")
    lines += ["", "Made with " + ", ".join(f"{k} {v}" for k, v in values["versions"].items()) + ".", ""]
    out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    typer.echo("\n".join(lines))


def run(work: Path, model: Path, text: Path, method: str, count: int) -> list[dict[str, int]]:
    """The memory of every process."""
    figures = work / f"{method}-{count}"
    figures.mkdir(exist_ok=True)
    script = work / "measured.py"
    script.write_text(MEASURED, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    words = ["recover", model, work / f"out-{method}-{count}", "--data", text, "--method", method, "--max-steps", 4]
    words += ["--batch-size", 4, "--micro-batch", 2, "--max-length", 64, "--held-out", 4, "--evaluations", 2]
    words += ["--device", "cpu", "--no-bf16", "--overwrite", *(["--shard"] if count > 1 else [])]
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "FIGURES": str(figures)}
    command = [sys.executable, *launcher, str(script), *map(str, words)]
    subprocess.run(command, check=True, env=environment)
    return [json.loads((figures / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(count)]


def measured(words: list[str]) -> None:
    """The command, in this process, with a thread that looks at its memory."""
    import slimgpt.recovery.run  # noqa: F401
    from slimgpt.cli import main as command

    values: dict[str, Any] = {"start": anonymous_rss(), "peak": 0}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            values["peak"] = max(values["peak"], anonymous_rss())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        sys.argv = ["slimgpt", *words]
        command()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        over.set()
        thread.join()
        file = Path(os.environ["FIGURES"]) / f"{os.environ.get('RANK', '0')}.json"
        file.write_text(json.dumps(values), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
