"""Prune a checkpoint of several gigabytes and watch the memory of the process:
benchmarks/results/memory.md and benchmarks/results/gpu.md.

    python benchmarks/bigger_than_memory.py --work /some/disk --out benchmarks/results/memory
    python benchmarks/bigger_than_memory.py --work /some/disk --out benchmarks/results/gpu --device cuda --memory 8GB \
        --hidden 4096 --ffn 11008 --heads 32 --kv 32 --layers 32 --num-samples 128 --seq-len 2048 \
        --methods paper,slimgpt
    python benchmarks/bigger_than_memory.py --work /some/disk --out benchmarks/results/memory-fp8 --fp8 \
        --hidden 2048 --ffn 5632 --heads 16 --kv 4 --layers 70

makes a Llama of random bf16 weights (or FP8, with a scale for 128 x 128 of them) in shards under WORK (kept for the
next time), runs `slimgpt prune` on it in a process of its own, and samples that process. Anonymous memory is what no
file stands behind: mapped weights can be dropped by the system at any time and do not count. Of a GPU's memory, what
torch has reserved at most is reported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer

from slimgpt import assets
from slimgpt.models.build import empty_model
from slimgpt.runtime.devices import as_device
from slimgpt.runtime.versions import versions

SHARD_BYTES = 10**9


RUN = """
import atexit, torch
from slimgpt.cli import main
if torch.cuda.is_available():
    atexit.register(lambda: print("reserved", torch.cuda.max_memory_reserved()))
main()
"""
"""The command itself, which says at its end what it had of a GPU's memory."""


FP8_BLOCK = 128


def make_checkpoint(
    folder: Path,
    hidden: int,
    ffn: int,
    heads: int,
    kv: int,
    layers: int,
    *,
    device: torch.device,
    fp8: bool,
) -> None:
    """Write a random bf16 Llama in shards of about a gigabyte, one tensor in memory at a time.

    Args:
        fp8: store the layers' matrices in FP8, as DeepSeek and Qwen publish theirs.
    """
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
    if fp8:
        config.quantization_config = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    generator = torch.Generator(device).manual_seed(0)
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
            tensor = torch.randn(shape, generator=generator, device=device) * shape[1] ** -0.5
            if fp8 and ".layers." in name:
                grid = [-(-axis // FP8_BLOCK) for axis in shape]
                scales = (0.5 + torch.rand(grid, generator=generator, device=device)) / 64
                shards[-1][f"{name}_scale_inv"] = scales.cpu()
                tensor = (64 * tensor).to("cpu", torch.float8_e4m3fn)
            else:
                tensor = tensor.to("cpu", torch.bfloat16)
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
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
    fp8: Annotated[bool, typer.Option(help="Store the layers' matrices in FP8, with scales.")] = False,
    memory: Annotated[str | None, typer.Option(help="Passed on to `slimgpt prune`.")] = None,
    device: Annotated[str, typer.Option(help="Passed on to `slimgpt prune`.")] = "cpu",
    methods: Annotated[str, typer.Option(help="Passed on to `slimgpt prune`, one after the other.")] = "paper",
    add: Annotated[
        bool, typer.Option(help="Keep what OUT has of the same weights and windows, such as another budget's.")
    ] = False,
) -> None:
    """Make the checkpoint if it is not there, prune it, and write the peaks."""
    target = as_device(device)
    data = out.with_suffix(".json")
    if add and not data.is_file():
        raise typer.BadParameter(f"{data} is not there to be added to; leave --add out")
    kept = json.loads(data.read_text(encoding="utf-8"))["results"] if add else []
    dense = work / f"llama-{hidden}-{ffn}-{heads}-{kv}-{layers}{'-fp8' if fp8 else ''}"
    if not dense.exists():
        make_checkpoint(dense, hidden, ffn, heads, kv, layers, device=target, fp8=fp8)
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    slim, results = work / "slim", list[dict[str, Any]]()
    if any((result["bytes_on_disk"], result["tokens"]) != (size, num_samples * seq_len) for result in kept):
        raise typer.BadParameter(f"{data} is about other weights or windows; leave --add out or give another --out")
    for method in methods.split(","):
        words = [sys.executable, "-c", RUN, "prune", str(dense), str(slim), "--method", method, "--overwrite"]
        words += ["--ratio", str(ratio), "--num-samples", str(num_samples), "--seq-len", str(seq_len)]
        words += ["--device", device] + (["--memory", memory] if memory else [])
        code, peaks, seconds, output = watch(words)
        typer.echo(output[-3000:])
        if code:
            raise typer.Exit(code)
        report = json.loads((slim / "slimgpt.json").read_text())
        reserved = [int(line.split()[1]) for line in output.splitlines() if line.startswith("reserved ")]
        results.append(
            {
                "method": method,
                "versions": versions(target),
                "bytes_on_disk": size,
                "parameters": report["plan"]["parameters_before"],
                "layers": layers,
                "tokens": num_samples * seq_len,
                "ratio": report["plan"]["achieved"],
                "memory_option": memory,
                "execution": report["execution"],
                "peak_anonymous_bytes": peaks["RssAnon"],
                "peak_mapped_file_bytes": peaks["RssFile"],
                "peak_device_bytes": reserved[-1] if reserved else None,
                "seconds": seconds,
                "seconds_by_part": {
                    part: sum(layer["seconds"][part] for layer in report["layers"])
                    for part in report["layers"][0]["seconds"]
                }
                | {
                    part: report[part]["seconds"]
                    for part in ("allocation", "distillation")
                    if "seconds" in report.get(part, {})
                },
            }
        )
    results = kept + results
    data.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")
    where = f"{size / 1e9:.2f} GB, {layers} layers of {hidden} / {ffn}, {'FP8' if fp8 else 'bf16'}, random"
    page = table(results, where, f"{num_samples} x {seq_len}")
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    typer.echo(page)


def table(results: list[dict[str, Any]], weights: str, windows: str) -> str:
    """The page: one column per result."""
    made = {json.dumps(result["versions"]): result["versions"] for result in results}
    on_gpu = any(result["peak_device_bytes"] for result in results)

    def line(name: str, cell: Callable[[dict[str, Any]], str]) -> str:
        return f"| {name} | " + " | ".join(cell(result) for result in results) + " |"

    def seconds(result: dict[str, Any], part: str) -> str:
        return f"{result['seconds_by_part'][part]:.0f}" if part in result["seconds_by_part"] else "none"

    kind = "quantised model" if "FP8" in weights else "model"
    lines = [
        f"# Memory of pruning {'on a GPU ' if on_gpu else ''}a {kind} that is larger than it",
        "",
        line("", lambda result: f"`--method {result['method']}`"),
        "|---|" + "---|" * len(results),
        line("weights on disk", lambda _: weights),
        line("calibration tokens", lambda _: windows),
        line("device", lambda result: result["versions"]["device"]),
        line("`--memory`", lambda result: result["memory_option"] or "not given"),
        line("peak anonymous memory", lambda result: f"**{result['peak_anonymous_bytes'] / 1e9:.2f} GB**"),
        *([line("peak of the GPU", lambda r: f"**{r['peak_device_bytes'] / 1e9:.2f} GB**")] if on_gpu else []),
        line("seconds, start and checkpoint included", lambda result: f"{result['seconds']:.0f}"),
        line("of these: forward passes", lambda result: seconds(result, "forward")),
        line("Gram matrices", lambda result: seconds(result, "hessian")),
        line("solver", lambda result: seconds(result, "solver")),
        line("measuring what each structure costs", lambda result: seconds(result, "allocation")),
        line("training", lambda result: seconds(result, "distillation")),
        "",
        "Written by `benchmarks/bigger_than_memory.py`; mapped files are not anonymous memory.",
        *("Made with " + ", ".join(f"{k} {v}" for k, v in used.items()) + "." for used in made.values()),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
