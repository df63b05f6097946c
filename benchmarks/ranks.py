"""The default with one process beside several, each with one thread: the table in benchmarks/results/ranks.md.

    python benchmarks/ranks.py --work /some/disk --out benchmarks/results/ranks --keep

prunes the demo model, saved as a folder of float32, by the default (text that it writes itself, measured widths,
training) with 1 and with N Gloo processes on the same N cores, in turn, and compares the plans, the weights and the
seconds of every part: the fastest of the rounds. With ``--keep`` runs that are in the working folder already are not
run again. Fewer than 64 x 512 tokens are neither measured nor trained on.

    python benchmarks/ranks.py --work /some/disk --out benchmarks/results/ranks-mixture --mixture --num-samples 32

does it with a mixture of experts of random numbers and random text, which is neither measured nor trained: what counts
is the time of the solver, whose experts the processes divide.
"""

from __future__ import annotations

import json
import math
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import slimgpt
from slimgpt.runtime.versions import versions

LIMITS = {"whole": 0.62, "measuring": 0.65, "writing": 0.65, "training": 0.65}
MIXTURE_LIMITS = {"solver": 0.65}
"""Shares of one process's seconds that two may take."""

MIXTURE = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 512,
    "decoder_sparse_step": 1,
}
MIXTURE_OPTIONS = ["--allocation", "schedule", "--distill", "off", "--whole-experts", "0", "--no-evaluate"]

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
    mixture: Annotated[bool, typer.Option("--mixture", help="A random mixture of experts, not measured.")] = False,
) -> None:
    """Run all rounds, one run after the other."""
    model = str(random_mixture(work / "mixture") if mixture else saved("demo", work / "dense"))
    more = [*MIXTURE_OPTIONS, "--calibration", str(work / "mixture.txt")] if mixture else []
    name, limits = ("mixture", MIXTURE_LIMITS) if mixture else ("ranks", LIMITS)
    runs: dict[int, list[dict[str, Any]]] = {1: [], processes: []}
    shape = f"{num_samples}x{seq_len}-{ratio:g}"
    for number in range(rounds):
        for count, done in runs.items():
            folder = work / f"{name}-{shape}-{count}-{number}"
            words = [model, str(folder), "--ratio", str(ratio), *more]
            words += ["--num-samples", str(num_samples), "--seq-len", str(seq_len)]
            done.append(run(folder, count, words, keep))
    folders = {count: work / f"{name}-{shape}-{count}-0" for count in runs}
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
        "relative_difference": difference_of_all(*weights),
        "seconds": {str(count): done for count, done in runs.items()},
        "ratios": ratios,
        "limits": limits,
        "mixture": MIXTURE if mixture else None,
        "load_average": os.getloadavg(),
        "versions": versions(torch.device("cpu")),
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result, fastest, f"{ratio:.0%} removed, {num_samples} x {seq_len} tokens", rounds)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    typer.echo(text)


def difference_of_all(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of all weights over their norm."""
    squares = [(float((other[name] - tensor).norm()) ** 2, float(tensor.norm()) ** 2) for name, tensor in one.items()]
    return math.sqrt(sum(far for far, _ in squares) / sum(whole for _, whole in squares))


def run(folder: Path, count: int, words: list[str], keep: bool) -> dict[str, Any]:
    """The seconds of a run, by part."""
    file = folder / SECONDS_FILE
    if keep and file.is_file():
        return json.loads(file.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "slimgpt", "prune", *words, "--device", "cpu"]
    start = time.perf_counter()
    subprocess.run([*command, "--overwrite"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    whole = time.perf_counter() - start
    report = json.loads((folder / "slimgpt.json").read_text())
    seconds = {
        "whole": whole,
        "writing": report["calibration"].get("self_written", {}).get("seconds", 0.0),
        "measuring": report["allocation"].get("seconds", 0.0),  # none with few tokens
        "training": report["distillation"].get("seconds", 0.0),
        "comparison": report["divergence"].get("seconds", 0.0),
    }
    for part in ("forward", "hessian", "solver"):
        seconds[part] = sum(layer["seconds"][part] for layer in report["layers"])
    file.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def saved(model: str, folder: Path) -> Path:
    """A model as a folder, if it is not there already: every process would read and de-quantise a GGUF file, and not
    every command takes one."""
    if not folder.is_dir():
        unfinished = folder.with_suffix(".unfinished")
        loaded, tokenizer = slimgpt.load(model, device="cpu")
        loaded.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def random_mixture(folder: Path) -> Path:
    """A mixture of experts of random numbers with a tokenizer of bytes, and text of random letters beside it."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", max_position_embeddings=4096, **MIXTURE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    folder.with_suffix(".txt").write_text(random_text(2**18), encoding="utf-8")
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte."""
    signs = ["<unk>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


def random_text(characters: int) -> str:
    """Random letters in lines of 256."""
    letters = torch.randint(97, 123, (characters,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return "\n\n".join(bytes(row.tolist()).decode() for row in letters.view(-1, 256)) + "\n"


def table(result: dict[str, Any], fastest: dict[int, dict[str, float]], given: str, rounds: int) -> str:
    """The page of figures."""
    processes, ratios, sizes = result["processes"], result["ratios"], result["mixture"]
    subject, title = "SmolLM2-135M-Instruct, default of `slimgpt prune`", "The default"
    if sizes is not None:
        title = "A mixture"
        subject = (
            f"A random mixture, {sizes['num_hidden_layers']} layers of {sizes['num_experts']} experts of "
            f"{sizes['moe_intermediate_size']} channels, `slimgpt prune {' '.join(MIXTURE_OPTIONS)}`"
        )
    lines = [
        f"# {title} in {processes} processes beside one",
        "",
        f"{subject}, {given}, Gloo, one thread each; the fastest of {rounds} rounds in turn.",
        "Written by `benchmarks/ranks.py`.",
        "",
        f"| seconds | 1 process | {processes} processes | ratio | at most |",
        "|---|---|---|---|---|",
        *(
            f"| {part} | {fastest[1][part]:.1f} | {fastest[processes][part]:.1f} | {ratio:.2f} "
            f"| {result['limits'].get(part, '')} |"
            for part, ratio in ratios.items()
        ),
        "",
        f"Text {'the same' if result['same_text'] else 'DIFFERENT'}, plan "
        f"{'the same' if result['same_plan'] else 'DIFFERENT'}, kept units "
        f"{'the same' if result['same_kept_units'] else 'DIFFERENT'}; weights differ by "
        f"{result['relative_difference']:.1e} (norm of the difference over the norm), the worst tensor by "
        f"{result['largest_relative_difference']:.1e}. Load average at the end {result['load_average'][0]:.1f}.",
        "",
        "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
