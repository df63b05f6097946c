"""A run on a model in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.calibration.windows import calibration_windows
from slimgpt.config import make_config
from slimgpt.distillation.data import OnRehearsed
from slimgpt.distillation.schedule import tokens_to_distill
from slimgpt.distillation.trainer import OnDistilled
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.lookup import check_context, text_config
from slimgpt.models.parameter_counts import describe
from slimgpt.models.ties import untie_as_held
from slimgpt.pipeline.callbacks import Callbacks, OnLayer
from slimgpt.pipeline.memory_sink import ModelInMemory
from slimgpt.pipeline.stages import PruneJob, run_stages
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.devices import as_device, as_dtype
from slimgpt.runtime.devices import forward_dtype as choose_forward_dtype
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.units import parse_bytes
from slimgpt.sensitivity.measure import OnMeasured


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ratio: float | None = None,
    calibration: str | Tensor = assets.DEMO,
    *,
    schedule: str | Sequence[float] | None = None,
    method: str = "slimgpt",
    num_samples: int = 128,
    seq_len: int = 2048,
    damping: float = 0.01,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    round_to: int = 1,
    uniform: bool = False,
    head_unit: str = "auto",
    repair: bool | None = None,
    batch_size: int = 4,
    forward_dtype: str = "auto",
    memory: str | None = None,
    params: str | int | None = None,
    bytes: str | int | None = None,
    kv_cache: str | None = None,
    allocation: str = "auto",
    plan: str | None = None,
    whole_experts: float = 0.0,
    distill: str | int = "auto",
    on_layer: OnLayer | None = None,
    on_measured: OnMeasured | None = None,
    on_distilled: OnDistilled | None = None,
    on_rehearsed: OnRehearsed | None = None,
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal LM of a supported family, loaded by :func:`slimgpt.load` or by transformers.
        tokenizer: its tokenizer; may be ``None`` when ``calibration`` is a tensor.
        ratio: the share of the decoder layers' parameters to remove, in (0, 1); 0.2 if not given.
        calibration: a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder of these, a ``datasets`` id, ``demo``, or a
            LongTensor of token ids ``(num_samples, seq_len)``.
        schedule: how the ratio is spread over the layers: a strategy by name (``log_increase`` if not given), or one
            ratio per layer.
        method: ``slimgpt``, ``paper``, one of its ablations ``paper-no-gcd`` and ``paper-no-dgs``, or a baseline:
            ``magnitude``, ``wanda``, ``random``.
        num_samples: calibration windows to cut from the text.
        seq_len: tokens per window.
        damping: share of the mean diagonal added to the Hessian's diagonal.
        seed: for the choice of text.
        device: where layers run, one at a time: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: convert the weights first: ``auto`` (leave them), ``float32``, ``float16`` or ``bfloat16``.
        round_to: every FFN width becomes a multiple of it.
        uniform: the same widths in all layers, so that a stock class holds the result.
        head_unit: remove ``kv`` heads with all their query heads, or ``query`` heads, equally many per KV head.
        repair: solve for the weights that stay; by default as the method's authors do.
        batch_size: windows that go through a layer together.
        forward_dtype: of the forward passes over the calibration tokens: ``auto``, ``float32``, ``float16`` or
            ``bfloat16``; weights are scored and repaired in their own type whatever it is.
        params: parameters that the whole model may have, such as ``1.0B``; in place of ``ratio``, never exceeded.
        bytes: bytes that its weights may take on disk, such as ``800MB``; in place of ``ratio``, never exceeded.
        kv_cache: what its KV cache may take at a context, such as ``1GB@32k``; whole KV heads go until it fits.
        allocation: ``schedule``: every layer loses what the schedule says; ``sensitivity``: as much goes where it costs
            least, measured on a trial run; ``search``: measured at more points and compared with the schedule's
            plan, then trained eight times as long, all matrices, mostly on text that the dense model writes. ``auto``:
            ``sensitivity`` for the method ``slimgpt`` where there are enough calibration tokens, else ``schedule``.
        plan: a file of widths that ``slimgpt plan --save`` wrote.
        whole_experts: in a mixture of experts, the share of what its experts lose that is taken as whole experts, from
            0 (channels inside experts only) to 1 (whole experts, and channels only for what those cannot express).
        distill: on how many calibration tokens output matrices and norms are trained together after pruning, towards
            what the dense model predicts and the text says, or ``off``; if more than there are, the dense model writes
            the others. ``auto``: for the method ``slimgpt``, where there are enough, on as many as cost 1.4 forward
            passes over all of them (11.5 with ``allocation`` ``search``), and not at all for the others.
        memory: what may be used on the device (on the CPU: by the process), such as ``8GB``; by default what is free.
        on_layer: called after every layer.
        on_measured: called after every step while costs are measured, with its number, the number of all steps and
            the seconds it took.
        on_distilled: called after every step of that training with its number, the number of all steps, the divergence
            per token and the seconds it took.
        on_rehearsed: called after every step of what comes before that training, while the dense model writes text and
            reads it, with what is done, the step's number, the number of all such steps and the seconds it took.

    Returns:
        What was asked for, planned and done.

    Raises:
        UsageError: an argument outside its range, too little text, or a ratio that no widths can meet.
        UnsupportedFamilyError: the family is not in the table.
        NumericalError: NaN or infinity in weights or activations, or a Hessian that is not positive definite.
    """
    config = make_config(
        ratio=ratio,
        schedule=schedule,
        method=method,
        repair=repair,
        head_unit=head_unit,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        damping=damping,
        seed=seed,
        round_to=round_to,
        uniform=uniform,
        forward_dtype=forward_dtype,
        params=params,
        bytes=bytes,
        kv_cache=kv_cache,
        allocation=allocation,
        plan=plan,
        whole_experts=whole_experts,
        distill=distill,
    )
    budget = parse_bytes(memory) if memory else None
    target, wanted = as_device(device), as_dtype(dtype)
    untie_as_held(model)
    shape = describe(model.config, model)
    kept_dtype = wanted if isinstance(wanted, torch.dtype) else next(model.parameters()).dtype
    widths = plan_for(model.config, config, shape, kept_dtype)
    windows, source = calibration_windows(calibration, tokenizer, config, text_config(model.config).vocab_size)
    if isinstance(wanted, torch.dtype):
        for parameter in model.parameters():  # not `model.to`: it would round rotary frequencies and other tables
            parameter.data = parameter.data.to(wanted)
        model.config.dtype = wanted
    name = str(model.config.name_or_path or type(model).__name__)
    stored = next(model.parameters()).dtype
    forward = choose_forward_dtype(config.forward_dtype, stored, target)
    check_context(model.config, "calibration windows (--seq-len)", windows.shape[1])
    job = PruneJob(
        name=name,
        config=config,
        shape=shape,
        plan=widths,
        windows=windows,
        calibration=source,
        device=target,
        stored=stored,
        dtype=forward,
        copied=forward is not None or next(model.parameters()).device != target,
        distill_tokens=tokens_to_distill(config, shape, widths, windows),
    )
    return run_in_memory(model, job, Callbacks(on_layer, on_measured, on_distilled, on_rehearsed), budget)


@in_eval_mode
def run_in_memory(
    model: PreTrainedModel, job: PruneJob, callbacks: Callbacks, budget: int | None = None
) -> PruneReport:
    """Prune a model in place.

    Args:
        budget: bytes that may be used on the device; ``None``: what is free.
    """
    memory = ModelInMemory(model)
    return run_stages(job, memory, memory, callbacks, Ranks(), budget)
