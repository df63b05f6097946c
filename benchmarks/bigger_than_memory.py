"""Prune a checkpoint of several gigabytes and watch the memory of the process: the table in docs/memory.md.

    python benchmarks/bigger_than_memory.py --work /some/disk --out docs/memory

makes a Llama of random bf16 weights in shards under WORK (kept for the next time), runs `slimgpt prune` on it in a
process of its own, and samples that process. Anonymous memory is what no file stands behind: mapped weights can be
dropped by the system at any time and do not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from slimgpt import assets
from slimgpt.api import versions
from slimgpt.models.heterogeneous import empty_model

SHARD_BYTES = 10**9


def make_checkpoint(folder: Path, hidden: int, ffn: int, heads: int, kv: int, layers: int) -> None:
    """Write a random bf16 Llama in shards of about a gigabyte, one tensor in memory at a time."""
    file = assets.demo_model()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        num_hidden_layers=layers,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    generator = torch.Generator().manual_seed(0)
    model = empty_model(config)
    shards: list[dict[str, torch.Tensor]] = [{}]
    where, size, total = {}, 0, 0
    names = [name for name in model.state_dict() if name not in (model.all_tied_weights_keys or {})]
    work = folder.with_name(folder.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)

    def flush() -> None:
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], work / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shards[-1], name))
        shards.append({})

    for name in names:
        shape = model.state_dict()[name].shape
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
        else:
            tensor = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).to(torch.bfloat16)
        shards[-1][name] = tensor
        size += tensor.numel() * 2
        total += tensor.numel() * 2
        if size > SHARD_BYTES:
            flush()
            shards[-2].clear()
            size = 0
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (work / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(work)
    tokenizer.save_pretrained(work)
    work.rename(folder)


def watch(words: list[str]) -> tuple[int, dict[str, int], float, str]:
    """Run a command; its exit code, the peaks of its memory in bytes, its seconds and its output."""
    start = time.perf_counter()
    peaks = {"RssAnon": 0, "RssFile": 0, "RssShmem": 0}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                key, _, value = line.partition(":")
                if key in peaks:
                    peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            time.sleep(0.02)
        output.seek(0)
        return process.returncode, peaks, time.perf_counter() - start, output.read()


def main(
    work: Annotated[Path, typer.Option(help="A folder on a disk with room for twice the model.")],
    out: Annotated[Path, typer.Option(help="Where to write, without a suffix.")],
    hidden: int = 3072,
    ffn: int = 8192,
    heads: int = 24,
    kv: int = 8,
    layers: int = 30,
    num_samples: int = 16,
    seq_len: int = 256,
    ratio: float = 0.2,
    memory: Annotated[str | None, typer.Option(help="Passed on to `slimgpt prune`.")] = None,
) -> None:
    """Make the checkpoint if it is not there, prune it, and write the peaks."""
    dense = work / f"llama-{hidden}-{ffn}-{heads}-{kv}-{layers}"
    if not dense.exists():
        make_checkpoint(dense, hidden, ffn, heads, kv, layers)
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    slim = work / "slim"
    words = [sys.executable, "-m", "slimgpt", "prune", str(dense), str(slim), "--ratio", str(ratio), "--overwrite"]
    words += ["--num-samples", str(num_samples), "--seq-len", str(seq_len), "--device", "cpu"]
    words += ["--memory", memory] if memory else []
    code, peaks, seconds, output = watch(words)
    typer.echo(output[-3000:])
    if code:
        raise typer.Exit(code)
    report = json.loads((slim / "slimgpt.json").read_text())
    result = {
        "bytes_on_disk": size,
        "parameters": report["plan"]["parameters_before"],
        "layers": layers,
        "tokens": num_samples * seq_len,
        "ratio": report["plan"]["achieved"],
        "memory_option": memory,
        "execution": report["execution"],
        "peak_anonymous_bytes": peaks["RssAnon"],
        "peak_mapped_file_bytes": peaks["RssFile"],
        "seconds": seconds,
        "seconds_by_part": {
            part: sum(layer["seconds"][part] for layer in report["layers"]) for part in report["layers"][0]["seconds"]
        },
        "versions": versions(torch.device("cpu")),
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Memory of pruning a model that is larger than it",
        "",
        "| | |",
        "|---|---|",
        f"| weights on disk | {size / 1e9:.2f} GB, {layers} layers of {hidden} / {ffn}, bf16, random |",
        f"| calibration | {num_samples} x {seq_len} tokens |",
        f"| `--memory` | {memory or 'not given'} |",
        f"| peak anonymous memory | **{peaks['RssAnon'] / 1e9:.2f} GB** |",
        f"| seconds, start and checkpoint included | {seconds:.0f} |",
        "| of these: forward / Gram matrices / solver | "
        + " / ".join(f"{result['seconds_by_part'][part]:.0f}" for part in ("forward", "hessian", "solver"))
        + " |",
        "",
        "Written by `benchmarks/bigger_than_memory.py`; mapped files are not anonymous memory.",
        "Made with " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
        "",
    ]
    out.with_suffix(".md").write_text("\n".join(lines), encoding="utf-8")
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
