"""Tokens per second, time to the first token, peak memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.errors import ModelError, UsageError
from slimgpt.models.lookup import check_context, text_config
from slimgpt.models.source import Source
from slimgpt.runtime.devices import synchronized_time


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds.

    Args:
        prefill: prompt tokens per second, of all rows of the batch together.
        decode: new tokens per second, likewise, one after another with the KV cache.
        first_token: seconds until the first new token.
    """

    prefill: float
    decode: float
    first_token: float


def check_generation(config: PreTrainedConfig, prompt: int, new_tokens: int, rounds: int, batch: int) -> None:
    """Refuse what :func:`measure_speed` cannot time.

    Raises:
        UsageError: a number below 1, or more tokens than the model's context.
    """
    if min(prompt, new_tokens, rounds, batch) < 1:
        raise UsageError(
            f"prompt {prompt}, new tokens {new_tokens}, rounds {rounds}, batch {batch}: all must be at least 1"
        )
    check_context(config, f"--prompt {prompt} and --new-tokens {new_tokens}, a text", prompt + new_tokens)


@torch.no_grad()
def measure_speed(
    models: Sequence[PreTrainedModel],
    prompt: int = 256,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 1,
) -> list[Speed]:
    """Time several models in turn, A B A B, so that a drift of the machine meets them all alike.

    Args:
        prompt: tokens per prompt, drawn at random from a fixed seed.
        new_tokens: tokens decoded after it.
        rounds: timed rounds, after one that is not counted.
        progress: called with rounds done and rounds in all.
        batch: prompts at once.

    Raises:
        UsageError: a number below 1, or more tokens than a model's context.
    """
    for model in models:
        check_generation(model.config, prompt, new_tokens, rounds, batch)
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    generator = torch.Generator().manual_seed(0)
    words = min(text_config(model.config).vocab_size for model in models)
    for turn in range(rounds + 1):
        ids = torch.randint(words, (batch, prompt), generator=generator)
        for model, rounds_taken in zip(models, times):
            rounds_taken.append(_one_round(model, ids.to(model.device), new_tokens))
        if progress:
            progress(turn + 1, rounds + 1)
    return [
        Speed(
            prefill=batch * prompt / statistics.median(t[0] for t in rounds_taken[1:]),
            decode=batch * new_tokens / statistics.median(t[1] for t in rounds_taken[1:]),
            first_token=statistics.median(t[0] for t in rounds_taken[1:]),
        )
        for rounds_taken in times
    ]


def _one_round(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    start = synchronized_time(ids.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    prefilled = synchronized_time(ids.device)
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return prefilled - start, synchronized_time(ids.device) - prefilled


_PROBE = """
import json, pathlib, re, resource, sys, torch
from transformers.utils import logging
from slimgpt.models.loading import Source, load_config, load_model
logging.disable_progress_bar()
location, gguf, adapter, trust, device, batch, prompt, new = sys.argv[1:]
source = Source(location, location, gguf or None, pathlib.Path(adapter) if adapter else None)
device = torch.device(device)
model = load_model(source, load_config(source, trust == "1"), "auto", device, trust == "1")
words = model.config.get_text_config(decoder=True).vocab_size
ids = (torch.arange(int(prompt)) % words).expand(int(batch), -1).to(device)
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(new), do_sample=False)
if device.type == "cuda":
    peak = torch.cuda.max_memory_allocated(device)
elif sys.platform == "linux":  # ru_maxrss would start at the parent's peak
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"peak": peak}))
"""


def peak_memory(
    source: Source,
    device: str = "cpu",
    *,
    batch: int = 1,
    prompt: int = 256,
    new_tokens: int = 16,
    trust_remote_code: bool = False,
) -> int:
    """Peak bytes of a fresh process that loads a model and generates.

    On CUDA the bytes are the device's, else the whole process's. The model is loaded as every command loads it: an
    adapter is merged, what lies beside a whole model is left out, and a slim checkpoint's class is that of this
    version, never the file in the folder, which anybody may have changed.

    Args:
        source: the model; a GGUF file is loaded as float32.
        trust_remote_code: let the fresh process run Python code of the model's folder.

    Raises:
        ModelError: the model does not load there.
    """
    command = [sys.executable, "-c", _PROBE, source.location, source.gguf_file or "", str(source.adapter or "")]
    command += ["1" if trust_remote_code else "0", device, *(str(number) for number in (batch, prompt, new_tokens))]
    # This very package, wherever it was imported from.
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{source.name} does not load in a fresh process: {reason}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])
