"""Tokens per second and peak memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.errors import ModelError


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds.

    Args:
        prefill: prompt tokens per second.
        decode: new tokens per second, one after another with the KV cache.
    """

    prefill: float
    decode: float


@torch.no_grad()
def measure_speed(
    models: Sequence[PreTrainedModel],
    prompt: int = 256,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Time several models in turn, A B A B, so that a drift of the machine meets them all alike.

    Args:
        prompt: tokens per prompt, drawn at random from a fixed seed.
        new_tokens: tokens decoded after it.
        rounds: timed rounds, after one that is not counted.
        progress: called with rounds done and rounds in all.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    generator = torch.Generator().manual_seed(0)
    for turn in range(rounds + 1):
        for model, taken in zip(models, times):
            ids = torch.randint(model.config.vocab_size, (1, prompt), generator=generator).to(model.device)
            taken.append(_one_round(model, ids, new_tokens))
        if progress:
            progress(turn + 1, rounds + 1)
    return [
        Speed(
            prefill=prompt / statistics.median(t[0] for t in taken[1:]),
            decode=new_tokens / statistics.median(t[1] for t in taken[1:]),
        )
        for taken in times
    ]


def _one_round(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    def now() -> float:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        return time.perf_counter()

    start = now()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefilled = now()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
    return prefilled - start, now() - prefilled


_PROBE = """
import json, re, resource, sys, torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=sys.argv[2] == "1", dtype="auto")
device = torch.device(sys.argv[3])
model.to(device)
ids = torch.arange(256).unsqueeze(0) % model.config.vocab_size
model.generate(ids.to(device), attention_mask=torch.ones_like(ids).to(device), max_new_tokens=16, do_sample=False)
if device.type == "cuda":
    peak = torch.cuda.max_memory_allocated(device)
elif sys.platform == "linux":  # ru_maxrss would start at the parent's peak
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"peak": peak}))
"""


def peak_memory(folder: str, own_code: bool, device: str = "cpu") -> int:
    """Peak bytes of a fresh process that loads a folder with plain transformers and generates 16 tokens.

    On CUDA the bytes are the device's, else the whole process's.

    Args:
        own_code: the folder is a slim checkpoint of ours that brings its modeling file: let it run.

    Raises:
        ModelError: the folder does not load there.
    """
    command = [sys.executable, "-c", _PROBE, folder, "1" if own_code else "0", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"{folder} does not load in a fresh process: {reason}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])
