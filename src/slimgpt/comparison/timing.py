"""Speed, memory and FLOPs of several models, measured in one run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from slimgpt.errors import ModelError
from slimgpt.evaluation.speed import measure_speed, peak_memory
from slimgpt.io.result import Result
from slimgpt.io.weight_files import weight_bytes
from slimgpt.models.loading import load
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.source import Source, locate
from slimgpt.planning.cost import decode_bytes, generation_flops
from slimgpt.runtime.devices import dtype_name
from slimgpt.runtime.versions import versions


class MetricFormat(NamedTuple):
    """Format of a metric of :class:`Timing`: title, unit as a divisor, format specification, and which is better."""

    title: str
    scale: float
    style: str
    better: str


METRIC_FORMATS = {
    "prefill": MetricFormat("prefill, tokens per second", 1, ",.0f", "more"),
    "decode": MetricFormat("decode, tokens per second", 1, ",.1f", "more"),
    "first_token": MetricFormat("first token, ms", 1e-3, ",.0f", "less"),
    "peak_memory": MetricFormat("peak memory, MB", 1e6, ",.0f", "less"),
    "prefill_flops": MetricFormat("MFLOPs per prompt token", 1e6, ",.0f", "less"),
    "decode_flops": MetricFormat("MFLOPs per new token", 1e6, ",.0f", "less"),
    "decode_bytes": MetricFormat("MB read per new token", 1e6, ",.0f", "less"),
}
"""By field of :class:`Timing`."""

PROMISES = ("prefill_flops", "decode_flops", "decode_bytes")
"""Fields that are counted, not timed; twice as few promise twice the speed."""


@dataclass(frozen=True)
class Timing:
    """One model at one batch size.

    Args:
        prefill: prompt tokens per second, all rows of the batch together.
        decode: new tokens per second, likewise.
        first_token: seconds until the first new token.
        peak_memory: bytes of a fresh process that loads the model and generates; ``None`` if not measured.
        prefill_flops: multiplications and additions per prompt token.
        decode_flops: the same per new token.
        decode_bytes: bytes of weights and KV cache that are read for it; rows of a batch share the weights.
    """

    model: str
    batch: int
    parameters: int
    bytes: int
    prefill: float
    decode: float
    first_token: float
    peak_memory: int | None
    prefill_flops: float
    decode_flops: float
    decode_bytes: float


@dataclass(frozen=True, repr=False)
class Timings(Result):
    """Timings of all models at all batch sizes, with the protocol."""

    rows: tuple[Timing, ...]
    base: str | None
    protocol: dict[str, Any]

    def ratios(self) -> dict[tuple[str, int], dict[str, float]]:
        """Ratios to the base, by model and batch size; for FLOPs and bytes read inverted: the speed-up that they alone
        would give."""
        bases = {row.batch: asdict(row) for row in self.rows if row.model == self.base}
        ratios = {}
        for row in self.rows:
            if row.model != self.base and row.batch in bases:
                own, base = asdict(row), bases[row.batch]
                ratios[row.model, row.batch] = {
                    name: (base[name] / own[name] if name in PROMISES else own[name] / base[name])
                    for name in (*METRIC_FORMATS, "parameters", "bytes")
                    if own[name] and base[name]
                }
        return ratios

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        ratios = [{"model": model, "batch": batch, **values} for (model, batch), values in self.ratios().items()]
        return {**asdict(self), "ratios": ratios}


def same_type(rows: Sequence[Timing]) -> bool:
    """Whether some models are stored with about as many bytes per parameter: their sizes compare."""
    stored = [row.bytes / row.parameters for row in rows]
    return max(stored) < 1.5 * min(stored)


def time_models(
    names: Sequence[str],
    base: str | None = None,
    batches: Sequence[int] = (1,),
    prompt: int = 512,
    new_tokens: int = 128,
    rounds: int = 5,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    memory: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time models in alternation (A B A B), so that drift of the machine affects all alike.

    Args:
        names: models as :func:`slimgpt.load` takes them; all are in memory at once.
        base: one of them; ratios are taken to it.
        memory: also load every model in a fresh process for its peak memory.
        progress: called with rounds done and rounds in all, over all batch sizes.

    Raises:
        ModelError: a model cannot be loaded.
        UsageError: a number out of range, or more tokens than a model's context.
    """
    sources = [locate(name) for name in names]
    models = [load(name, dtype, device, trust_remote_code)[0] for name in names]
    speeds = []
    for turn, batch in enumerate(batches):

        def step(done: int, total: int, turn: int = turn) -> None:
            if progress:
                progress(turn * total + done, len(batches) * total)

        speeds.append(measure_speed(models, prompt, new_tokens, rounds, step, batch))
    target = models[0].device
    columns = [_model_columns(source, model, prompt, new_tokens, batches) for source, model in zip(sources, models)]
    stored = dtype_name(models[0].dtype)
    del models  # the fresh processes need the memory
    rows = [
        Timing(
            model=name,
            batch=batch,
            prefill=speed.prefill,
            decode=speed.decode,
            first_token=speed.first_token,
            peak_memory=_peak(source, str(target), batch, prompt, new_tokens, trust_remote_code) if memory else None,
            **model_columns,
        )
        for batch, of_batch, batch_columns in zip(batches, speeds, zip(*columns))
        for name, source, model_columns, speed in zip(names, sources, batch_columns, of_batch)
    ]
    return Timings(
        rows=tuple(rows),
        base=base,
        protocol={
            "prompt": prompt,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "order": "models in turn within every round; medians; one round before that is not counted",
            "dtype": stored,
            "device": target.type,
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "versions": versions(target),
        },
    )


def speed(
    model: str,
    against: str | None = None,
    *,
    batches: Sequence[int] = (1,),
    prompt: int = 512,
    new_tokens: int = 128,
    rounds: int = 5,
    memory: bool = True,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Prefill and decode in tokens per second, time to the first token, peak memory, bytes and FLOPs of a model.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or ``demo``.
        against: the dense model, timed in turn with it; ratios are taken to it.
        batches: prompts at once.
        prompt: tokens per prompt.
        new_tokens: tokens decoded after it.
        rounds: timed rounds; medians count.
        memory: also load every model in a fresh process for its peak memory.
        progress: called with rounds done and rounds in all, over all batch sizes.

    Raises:
        ModelError: a model cannot be loaded.
        UsageError: a number out of range, or more tokens than a model's context.
    """
    return time_models(
        [model] if against is None else [against, model],
        against,
        batches,
        prompt,
        new_tokens,
        rounds,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        memory=memory,
        progress=progress,
    )


def _model_columns(
    source: Source, model: PreTrainedModel, prompt: int, new_tokens: int, batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Columns that are counted, not timed, at every batch size."""
    parameters, itemsize = sum(p.numel() for p in model.parameters()), model.dtype.itemsize
    size = parameters * itemsize
    if source.folder is not None:
        file = source.folder / (source.gguf_file or "")
        size = file.stat().st_size if source.gguf_file else weight_bytes(source.folder)
    layers, context = layer_sizes(model.config), prompt + new_tokens // 2
    prefill, decode = generation_flops(model.config, layers, parameters, prompt, new_tokens)
    return [
        {
            "parameters": parameters,
            "bytes": size,
            "prefill_flops": prefill,
            "decode_flops": decode,
            "decode_bytes": decode_bytes(model.config, layers, parameters, itemsize, context, batch) / batch,
        }
        for batch in batches
    ]


def _peak(source: Source, device: str, batch: int, prompt: int, new_tokens: int, trust_remote_code: bool) -> int | None:
    sizes = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
    try:
        return peak_memory(source, device, **sizes, trust_remote_code=trust_remote_code)
    except ModelError:  # needs code of its own, or does not fit twice
        return None
