"""Estimate of the result and cost of pruning a model, from its config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from slimgpt.calibration.windows import evaluation_tokens
from slimgpt.config import PruneConfig, make_config
from slimgpt.distillation.schedule import BACKWARD_COST, passes_to_distill, tokens_to_distill
from slimgpt.evaluation.layer_times import OnTimed
from slimgpt.io.result import Result
from slimgpt.models.architecture import KV_HEADS
from slimgpt.models.build import empty_model
from slimgpt.models.loading import load_config
from slimgpt.models.lookup import text_config
from slimgpt.models.parameter_counts import ModelShape, describe
from slimgpt.models.source import check_files, has_weights, locate
from slimgpt.models.streaming import stored_dtype
from slimgpt.pipeline.speed_target import planned, speed_promise
from slimgpt.planning.alignment import why_not_nearer
from slimgpt.planning.cost import DTYPE_BYTES, flops_per_token, gguf_bytes, pruning_flops, pruning_seconds
from slimgpt.planning.engines import EngineSupport, engine_support, suit_engines
from slimgpt.planning.few_widths import widths_text
from slimgpt.planning.plan import Plan
from slimgpt.planning.restriction import restricted
from slimgpt.planning.targets import cache_bytes
from slimgpt.pruning.memory_estimate import memory_need
from slimgpt.runtime.devices import as_device, as_dtype
from slimgpt.runtime.settings import has_settings
from slimgpt.sensitivity.allocate import quadrature, uses_sensitivity
from slimgpt.sensitivity.measure import num_gradient_nodes
from slimgpt.sensitivity.whole_experts import MOST_TRIALS, measures_experts
from slimgpt.sensitivity.windows import split_windows

if TYPE_CHECKING:
    from slimgpt.pipeline.prepare import PruneRequest


MEASURED_IN_RUN = "the run measures whether whole experts, channels of them or both go, at this size (--whole-experts)"


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """A plan, and what it means.

    Args:
        bytes: of the weights by type.
        gguf_bytes: the same by type of GGUF quantisation, about.
        kv_before: bytes of KV cache per token, 16 bits, full attention in every layer.
        flops_before: per generated token, the attention over the context left out.
        memory: bytes that pruning needs beside the mapped weights, about.
        seconds: that pruning takes on this machine, about.
        quantization: how the model's files are quantised, and what they are read as; ``None`` if they are not.
        note: why another share is removed than was asked for, or in another step; ``None`` if neither is so.
        experts: what a run measures of the experts of a mixture, and may decide otherwise; ``None`` if nothing.
        widths: where a few widths were asked for, each with the number of its layers; else ``None``.
        speed: where a speed was asked for: how many times as fast was asked and is promised, and the table of times.
    """

    model: str
    model_type: str
    plan: Plan
    bytes: dict[str, int]
    gguf_bytes: dict[str, int]
    kv_before: int
    kv_after: int
    flops_before: float
    flops_after: float
    memory: int
    seconds: float
    tokens: int
    device: str
    verdicts: tuple[EngineSupport, ...]
    quantization: dict[str, str] | None = None
    note: str | None = None
    experts: str | None = None
    speed: dict[str, Any] | None = None
    widths: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return asdict(self)

    def runs(self) -> Iterator[tuple[int, int, dict[str, int]]]:
        """Neighbouring layers of the same widths: first, last, widths."""
        first = 0
        for index, sizes in enumerate(self.plan.layers):
            if index + 1 == len(self.plan.layers) or self.plan.layers[index + 1] != sizes:
                yield first, index, sizes
                first = index + 1


def all_flops(
    model_config: PreTrainedConfig, config: PruneConfig, shape: ModelShape, plan: Plan, windows: Tensor
) -> dict[str, float]:
    """Multiplications and additions by part of all that pruning does: measuring, the loop itself, training.

    Args:
        windows: ``(num_samples, seq_len)``; only its shape counts.
    """
    dense = [layer.sizes for layer in shape.layers]

    def loop(tokens: int) -> dict[str, float]:
        return pruning_flops(model_config, dense, plan.layers, tokens, config.seq_len)

    flops = loop(windows.numel())
    each = flops["dense forward"] / windows.numel()
    head = 2.0 * text_config(model_config).vocab_size * text_config(model_config).hidden_size
    flops["gradients"] = 0.0
    if uses_sensitivity(config, shape, windows):
        fit, probe = split_windows(windows, shape.widest)
        trial = loop(fit.numel())
        for points in quadrature(config):
            for part in ("forward", "hessian", "solver"):
                flops[part] += trial[part]
            # Forward: the dense model and every node. Backward: nodes with gradients, recomputed.
            forward, backward = 1 + len(points), num_gradient_nodes(points)
            layer_flops = each * (forward + backward * (1 + BACKWARD_COST))
            flops["gradients"] += probe.numel() * (layer_flops + (forward + backward) * head)
        gone = sum(bool(layer.attention_parameters) for layer in shape.layers)
        if config.drop_attention:
            # On half of the text each attention is taken out in turn: the layers behind run once more for every one.
            flops["gradients"] += probe.numel() / 2 * (each * (1 + gone / 2) + (1 + gone) * head)
    if measures_experts(config, shape, windows):
        fit, probe = split_windows(windows, shape.widest)
        trial = loop(fit.numel())
        for part in ("forward", "hessian", "solver"):
            flops[part] += MOST_TRIALS * trial[part]
        # The dense model once, every pruned one, and the predictions of both.
        flops["forward"] += probe.numel() * (each * (1 + MOST_TRIALS) + 2 * MOST_TRIALS * head)
    if tokens := tokens_to_distill(config, plan, windows):
        # The dense model once; predictions of the dense model, of the pruned one, and back.
        flops["gradients"] += each * passes_to_distill(config, plan, windows, tokens) + tokens * 3 * head
    if config.evaluate:
        # Two texts through the dense and the pruned layers, each with its head.
        flops["forward"] += 4 * evaluation_tokens(windows.numel()) * (each + head)
    return flops


def run_seconds(request: PruneRequest, num_samples: int | None = None) -> float:
    """About how long a run takes on its device, without loading and saving.

    Args:
        num_samples: calibration windows in place of the request's.
    """
    tokens = torch.empty(num_samples or len(request.windows), request.windows.shape[1], device="meta")
    flops = all_flops(request.model_config, request.config, request.shape, request.plan, tokens)
    return pruning_seconds(flops, request.device, request.stored)


def forecast(
    model: str,
    config: PruneConfig,
    dtype: str = "auto",
    engines: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    device: str = "auto",
    *,
    on_timed: OnTimed | None = None,
) -> Estimate:
    """Plan without loading a weight.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or ``demo``.
        dtype: of the weights on disk.
        engines: to be judged; all of them if not given.
        on_timed: called after every timing of layers, where a speed is asked for.

    Raises:
        SlimGPTError: the model cannot be planned for, or no widths can do what was asked for.
    """
    as_dtype(dtype)
    target = as_device(device)
    source = locate(model)
    if source.folder is not None and has_weights(source.folder):  # a folder of a config alone can be planned for
        check_files(source)
    model_config = load_config(source, trust_remote_code)
    empty = empty_model(model_config)
    shape = restricted(describe(model_config, empty), config)
    stored = stored_dtype(source, model_config, dtype)
    plan, target_speed = planned(model_config, config, shape, stored, target, on_timed=on_timed)
    quantization = source.quantization
    dense = [layer.sizes for layer in shape.layers]
    tokens = torch.empty(config.num_samples, config.seq_len, device="meta")
    need = memory_need(empty, tokens, plan, config, stored, copied=target.type != "cpu")
    flops = all_flops(model_config, config, shape, plan, tokens)
    caches = [[sizes[KV_HEADS] for sizes in layers] for layers in (dense, plan.layers)]
    return Estimate(
        model=source.name,
        model_type=model_config.model_type,
        plan=plan,
        bytes={name: plan.parameters * size for name, size in DTYPE_BYTES.items()},
        gguf_bytes=gguf_bytes(model_config, plan),
        kv_before=cache_bytes(model_config, caches[0], 1),
        kv_after=cache_bytes(model_config, caches[1], 1),
        flops_before=flops_per_token(model_config, plan, shape),
        flops_after=flops_per_token(model_config, plan),
        memory=max(need.layer, need.solver) + need.between_layers + need.kept,
        seconds=pruning_seconds(flops, target, stored),
        tokens=tokens.numel(),
        device=target.type,
        verdicts=tuple(engine_support(model_config, plan.layers, engines)),
        quantization=None if quantization is None else quantization.to_json(stored),
        note=why_not_nearer(config, shape, plan),
        widths=None if config.num_widths is None else widths_text(plan),
        experts=MEASURED_IN_RUN if measures_experts(config, shape, tokens) else None,
        speed=None
        if target_speed is None
        else {**speed_promise(target_speed, shape, plan), "table": target_speed.table.to_json()},
    )


@has_settings(PruneConfig, before={"dtype": "params bytes kv_cache", "device": ""})
def plan(
    model: str,
    ratio: float | None = None,
    *,
    engines: str | Sequence[str] | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device: str = "auto",
    **settings: Any,
) -> Estimate:
    """The result of pruning a model, before any weight is loaded: widths, sizes, cost, and which engines run it.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or ``demo``.
        engines: engines to suit, such as ``vllm`` or ``["vllm", "llama.cpp"]``: ``uniform`` and ``round_to`` become
            what they ask for where nothing is said, and only they are judged.
        dtype: of the weights on disk: ``auto`` (as stored), ``float32``, ``float16`` or ``bfloat16``.
        trust_remote_code: let the config run Python code from the model's repository.
        device: where the time is estimated for.
        **settings: the fields of :class:`slimgpt.PruneConfig`.

    Raises:
        UsageError: a setting outside its range, an unknown engine, or a ratio that no widths can meet.
        ModelError: the model cannot be found, or its family is not described.
    """
    names = [engines] if isinstance(engines, str) else None if engines is None else list(engines)
    chosen: dict[str, Any] = {"ratio": ratio, **settings}
    if names is not None:
        suit_engines(names, chosen)
    return forecast(model, make_config(**chosen), dtype, names, trust_remote_code, device)
