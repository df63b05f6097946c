"""The results of six tiny runs, to the bit: written before a change that shall move nothing, and checked after it.

    python tests/golden.py write FILE
    python tests/golden.py check FILE

The values hold on the machine that wrote them and with the same versions of torch and transformers: another processor
adds in another order. The package is the one in `src` beside this script, which uses nothing of it but public names and
the command line. It takes half a minute to a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Before torch is imported. The environment is that of the processes started here, too.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, logging

import slimgpt

SOURCE = Path(__file__).resolve().parents[1] / "src"

SENTENCES = [
    "The river runs past the old mill and on to the sea.",
    "A small model that answers at once is worth more than a large one that does not.",
    "She counted the heads, the channels and the layers, and wrote them down.",
    "Nothing is removed that the rest cannot make up for.",
]
VOCABULARY = 260

SHARED = {"calibration": "text.txt", "seq_len": 48, "batch_size": 3, "device": "cpu", "forward_dtype": "float32"}
FEW = {**SHARED, "num_samples": 24}
MANY = {**SHARED, "num_samples": 96}
"""Enough to measure on, to hold some windows out, and to train on the others."""

VOLATILE = ("seconds", "processor_seconds", "request", "versions")
"""Keys of a report that hold times, a digest of versions, and versions."""

KILLED_AFTER = 3
"""So many layer files are there when the process is killed."""


# Tiny models


def tiny_model(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random model in fp32 whose norms and biases are drawn, too."""
    values: dict[str, Any] = {
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "intermediate_size": 52,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
        **changes,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Large enough that predictions are far from uniform: a divergence near zero would train next to nothing.
            spread = 0.7 if "embed" in name else 1.2 / parameter.shape[-1] ** 0.5 + 0.1
            parameter.copy_(0.6 + 0.4 * noise if "norm" in name else noise * spread)
    return model


def tiny_mixture() -> PreTrainedModel:
    """A random mixture of experts, every second layer of it without experts."""
    return tiny_model(
        "qwen3_moe",
        num_experts=7,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        decoder_sparse_step=2,
        attention_bias=True,
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte: nothing of it is trained."""
    signs = ["<unk>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


def words(count: int) -> str:
    """Words of the sentences, in lines of twelve, in an order that does not repeat."""
    known = " ".join(SENTENCES).split()
    order = torch.randint(len(known), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join(known[i] for i in order[start : start + 12]) for start in range(0, count, 12)]
    return "\n".join(lines) + "\n"


def save_dense(model: PreTrainedModel, folder: Path) -> None:
    """A model folder with its tokenizer, in shards that cut through layers."""
    model.save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)


# What is recorded


def sha256(data: bytes) -> str:
    """The digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def without(values: Any, keys: tuple[str, ...] = VOLATILE) -> Any:
    """JSON values without some keys, wherever they are."""
    if isinstance(values, dict):
        return {key: without(value, keys) for key, value in values.items() if key not in keys}
    if isinstance(values, (list, tuple)):
        return [without(value, keys) for value in values]
    return values


def of_report(report: Any) -> dict[str, Any]:
    """A report as JSON, and its digest, which is another where only the order of keys is."""
    stable = json.loads(json.dumps(without(report)))
    return {"values": stable, "sha256": sha256(json.dumps(stable).encode())}


def of_folder(folder: Path) -> dict[str, Any]:
    """The digests of a model folder's files, its config and its report.

    Of the modeling file only the name: it repeats comments of the package's source, and those may change.
    """
    digests = {
        file.name: None if file.suffix == ".py" or file.name == "slimgpt.json" else sha256(file.read_bytes())
        for file in sorted(folder.iterdir())
    }
    return {
        "files": digests,
        "config": json.loads((folder / "config.json").read_text(encoding="utf-8")),
        "report": of_report(json.loads((folder / "slimgpt.json").read_text(encoding="utf-8"))),
    }


def of_state(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of every tensor."""
    found = {}
    for name, tensor in state.items():
        numbers = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + numbers)
    return found


# The runs; relative paths, since the names of models and texts are in the reports


def in_memory(model_name: str, output: str, **options: Any) -> dict[str, Any]:
    """Pruned in memory, then saved."""
    model, tokenizer = slimgpt.load(model_name)
    report = slimgpt.prune(model, tokenizer, **options)
    slimgpt.save(model, tokenizer, report, output)
    return {
        "report": of_report(report.to_json()),
        "state": of_state(model.state_dict()),
        "folder": of_folder(Path(output)),
    }


def to_folder(model_name: str, output: str, **options: Any) -> dict[str, Any]:
    """Pruned from folder to folder."""
    report = slimgpt.prune_folder(model_name, output, **options)
    return {"report": of_report(report.to_json()), "folder": of_folder(Path(output))}


def command(model_name: str, output: str, options: Mapping[str, Any]) -> list[str]:
    """The words of the command line behind `python`."""
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["-m", "slimgpt", "prune", model_name, output, *given]


def call(words: list[str]) -> None:
    """Run Python to its end."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def schedule() -> dict[str, Any]:
    """Every layer loses what the schedule says, as the paper does it."""
    options = {**FEW, "ratio": 0.3, "method": "paper", "allocation": "schedule", "distill": "off"}
    return {
        "in memory": in_memory("dense", "schedule-memory", **options),
        "to a folder": to_folder("dense", "schedule-folder", **options),
    }


def measured() -> dict[str, Any]:
    """As much goes where it costs least; then a short training; once in 16 bits and with KV heads."""
    options = {**MANY, "ratio": 0.3, "allocation": "sensitivity", "distill": 1500}
    return {
        "in memory": in_memory("dense", "measured-memory", **options),
        "to a folder": to_folder("dense", "measured-folder", dtype="bfloat16", head_unit="kv", **options),
    }


def search() -> dict[str, Any]:
    """Widths by search, and a training on more tokens than there are: the dense model writes the others."""
    options = {**MANY, "ratio": 0.4, "allocation": "search", "distill": 4500}
    return {
        "in memory": in_memory("dense", "search-memory", **options),
        "to a folder": to_folder("dense", "search-folder", **options),
    }


def mixture() -> dict[str, Any]:
    """Whole experts, and channels inside those that stay."""
    options = {**FEW, "ratio": 0.3, "whole_experts": 0.5}
    return {
        "in memory": in_memory("mixture", "mixture-memory", **options),
        "to a folder": to_folder("mixture", "mixture-folder", **options),
    }


def resumed() -> dict[str, Any]:
    """Killed after some layers, and resumed by the same command: a measured plan and a training."""
    options = {**MANY, "ratio": 0.3, "allocation": "sensitivity", "distill": 1500}
    given = command("deep", "resumed", options)
    layers = Path(".resumed.unfinished/layers")

    def count() -> int:
        return len(list(layers.glob("*.safetensors")))

    with subprocess.Popen([sys.executable, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.poll() is None and count() < KILLED_AFTER:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    if count() < KILLED_AFTER or Path("resumed").exists():
        sys.exit(f"the run that was to be killed ended before:\n{said.decode()[-4000:]}")
    call([*given, "--resume"])
    return {"to a folder": {"folder": of_folder(Path("resumed"))}}


def two_processes() -> dict[str, Any]:
    """The calibration windows divided between two processes that sum up over gloo."""
    options = {**MANY, "ratio": 0.3, "allocation": "sensitivity", "distill": 1500}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    call([*launcher, *command("dense", "two", options)])
    return {"to a folder": {"folder": of_folder(Path("two"))}}


RUNS: tuple[Callable[[], dict[str, Any]], ...] = (schedule, measured, search, mixture, resumed, two_processes)


def record() -> dict[str, Any]:
    """All runs, in a folder that is gone afterwards; what they gave, by name."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    began, before = time.perf_counter(), Path.cwd()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            save_dense(tiny_model(), Path("dense"))
            save_dense(tiny_mixture(), Path("mixture"))
            save_dense(tiny_model(num_hidden_layers=8, intermediate_size=300), Path("deep"))
            Path("text.txt").write_text(words(2000), encoding="utf-8")
            for run in RUNS:
                start = time.perf_counter()
                found[run.__name__] = run()
                print(f"{run.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
        finally:
            os.chdir(before)
    print(f"all runs: {time.perf_counter() - began:.1f} s")
    return found


def require_training(found: dict[str, Any]) -> None:
    """Stop unless widths were measured and a training was kept where a run is here for that."""
    for name in ("measured", "search", "resumed", "two_processes"):
        for part in found[name].values():
            report = part["folder"]["report"]["values"]
            trained = report["distillation"]
            if not (report["allocation"] and trained["kept"]):
                sys.exit(f"{name}: widths were not measured, or what was trained was not kept")
            if (name == "search") != bool(trained["written_tokens"]):
                sys.exit(f"{name}: {trained['written_tokens']} tokens were written by the dense model")


# Differences


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """What two records differ in, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            place = f"{where} / {key}" if where else key
            if key not in now:
                yield f"{place}: gone; it was {short(before[key])}"
            elif key not in before:
                yield f"{place}: new; it is {short(now[key])}"
            else:
                yield from differences(before[key], now[key], place)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{where}[{index}]")
    elif before != now:
        yield f"{where}: was {short(before)}, now {short(now)}"


def short(value: Any) -> str:
    """A value on a line."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def main(arguments: list[str]) -> int:
    """Write a file or check against it; 1 if something moved."""
    if len(arguments) != 2 or arguments[0] not in ("write", "check"):
        print(__doc__)
        return 2
    file = Path(arguments[1]).resolve()
    before = json.loads(file.read_text(encoding="utf-8")) if arguments[0] == "check" else None
    package = Path(slimgpt.__file__).resolve()
    print(f"package: {package.parent}")
    if not package.is_relative_to(SOURCE):
        print(f"not the one in {SOURCE}")
        return 2
    found = record()
    require_training(found)
    if before is None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {file}")
        return 0
    lines = list(differences(before, json.loads(json.dumps(found))))
    print("\n".join(lines) if lines else "nothing moved")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
