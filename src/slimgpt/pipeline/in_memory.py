"""A run on a model in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt.calibration.batch_generation import parameters_moved
from slimgpt.calibration.evaluation_text import evaluation_texts
from slimgpt.calibration.generation_limits import fits_whole, writing_dtype
from slimgpt.calibration.mixture import AUTO, read_calibration
from slimgpt.calibration.self_calibration import write_calibration
from slimgpt.calibration.windows import Calibration
from slimgpt.config import PruneConfig, make_config
from slimgpt.distillation.data import OnRehearsed
from slimgpt.distillation.schedule import tokens_to_distill
from slimgpt.distillation.trainer import OnDistilled
from slimgpt.errors import UsageError
from slimgpt.layerwise.on_demand import on_demand
from slimgpt.models.build import decoder_layers
from slimgpt.models.eval_mode import in_eval_mode
from slimgpt.models.lookup import check_context, text_config
from slimgpt.models.parameter_counts import describe
from slimgpt.models.ties import untie_as_held
from slimgpt.pipeline.callbacks import WRITING, Callbacks, OnLayer, with_bars
from slimgpt.pipeline.memory_sink import LayersInMemory, ModelInMemory
from slimgpt.pipeline.speed_target import TIMING, known_table, planned
from slimgpt.pipeline.stages import PruneJob, run_stages
from slimgpt.planning.restriction import restricted
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.devices import as_device, as_dtype
from slimgpt.runtime.devices import forward_dtype as choose_forward_dtype
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.settings import has_settings
from slimgpt.runtime.units import parse_bytes
from slimgpt.sensitivity.measure import OnMeasured


@has_settings(
    PruneConfig,
    before={
        "device": "schedule method num_samples seq_len damping seed",
        "memory": "round_to uniform num_widths head_unit repair batch_size forward_dtype",
        "on_layer": "",
    },
)
def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ratio: float | None = None,
    calibration: Calibration = AUTO,
    *,
    device: str = "auto",
    dtype: str = "auto",
    memory: str | None = None,
    on_layer: OnLayer | None = None,
    on_measured: OnMeasured | None = None,
    on_distilled: OnDistilled | None = None,
    on_rehearsed: OnRehearsed | None = None,
    progress: bool = False,
    **settings: Any,
) -> PruneReport:
    """Prune a model in place.

    Args:
        model: a causal LM of a supported family, loaded by :func:`slimgpt.load` or by transformers.
        tokenizer: its tokenizer; may be ``None`` when ``calibration`` is a tensor.
        calibration: ``auto`` (text that the model writes itself), a ``.txt``, ``.jsonl`` or ``.parquet`` file, a folder
            of these, a ``datasets`` id, ``demo``, ``mix``, several of these with shares (``auto:2,text.jsonl:1``), a
            list of texts or of rows, a ``datasets.Dataset``, or a LongTensor of token ids ``(num_samples, seq_len)``.
        device: where layers run, one at a time: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: convert the weights first: ``auto`` (leave them), ``float32``, ``float16`` or ``bfloat16``.
        memory: what may be used on the device (on the CPU: by the process), such as ``8GB``; by default what is free.
        **settings: the fields of :class:`slimgpt.config.PruneConfig`.
        on_layer: called after every layer.
        on_measured: called after every step while costs are measured, with its number, the number of all steps and
            the seconds it took.
        on_distilled: called after every step of that training with its number, the number of all steps, the divergence
            per token and the seconds it took.
        on_rehearsed: called after every step while layers and the result are timed (``speedup``), while the model
            writes calibration text, and of what comes before that training (the dense model writes text and reads it),
            with the name of the phase, the step's number, the number of all such steps and the seconds it took.
        progress: show a bar for every phase.

    Returns:
        What was asked for, planned and done.

    Raises:
        UsageError: an argument outside its range, too little text, or a ratio that no widths can meet.
        UnsupportedFamilyError: the family is not in the table.
        NumericalError: NaN or infinity in weights or activations, or a Hessian that is not positive definite.
    """
    if not hasattr(model, "config"):
        raise UsageError(
            f"model is a {type(model).__name__}, not a loaded model; load it with slimgpt.load(...), or prune a "
            "name or a folder into another folder with slimgpt.prune_folder(model, out, ...)"
        )
    config = make_config(ratio=ratio, **settings)
    callbacks = Callbacks(on_layer, on_measured, on_distilled, on_rehearsed)
    callbacks = with_bars(callbacks) if progress else callbacks
    budget = parse_bytes(memory) if memory else None
    job = job_in_memory(
        model, tokenizer, config, calibration, callbacks.prepare_step, device=device, dtype=dtype, budget=budget
    )
    return run_in_memory(model, job, callbacks, budget)


def job_in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruneConfig,
    calibration: Calibration = AUTO,
    on_rehearsed: OnRehearsed | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    budget: int | None = None,
) -> PruneJob:
    """Input of the stages for a model in memory: everything checked, the text read, or written by the model.

    Args:
        on_rehearsed: called after every step while the model writes.
        budget: bytes that may be used on the device; ``None``: what is free.

    Raises:
        SlimGPTError: see :func:`prune`.
    """
    target, weight_dtype = as_device(device), as_dtype(dtype)
    untie_as_held(model)
    shape = restricted(describe(model.config, model), config)
    kept_dtype = weight_dtype if isinstance(weight_dtype, torch.dtype) else next(model.parameters()).dtype
    on_timed = partial(on_rehearsed, TIMING) if on_rehearsed else None
    if config.speedup is None:
        widths, speed = planned(model.config, config, shape, kept_dtype, target)
    else:
        known_table(model.config, config)  # layers are timed once the text is checked
    vocab_size = text_config(model.config).vocab_size
    mixture = read_calibration(calibration, tokenizer, config, vocab_size)
    if isinstance(weight_dtype, torch.dtype):
        for parameter in model.parameters():  # not `model.to`: it would round rotary frequencies and other tables
            parameter.data = parameter.data.to(weight_dtype)
        model.config.dtype = weight_dtype
    name = str(model.config.name_or_path or type(model).__name__)
    stored = next(model.parameters()).dtype
    forward = choose_forward_dtype(config.forward_dtype, stored, target)
    check_context(model.config, "calibration windows (--seq-len)", mixture.windows.shape[1])
    if config.speedup is not None:
        widths, speed = planned(model.config, config, shape, kept_dtype, target, on_timed=on_timed)
    placed = parameters_moved
    moved = mixture.self_written and next(model.parameters()).device.type != target.type
    if moved and not fits_whole(widths.parameters_before, stored.itemsize, target, budget, name):
        placed = on_demand(decoder_layers(model).__getitem__, budget)
    text, info = mixture.complete(
        lambda count, held_out: in_eval_mode(write_calibration)(
            model,
            tokenizer,  # type: ignore[arg-type]  # there is no text of its own without one
            count,
            config.seq_len,
            config.seed,
            held_out=held_out,
            device=target,
            dtype=writing_dtype(config.forward_dtype, stored, target),
            budget=budget,
            on_written=partial(on_rehearsed, WRITING) if on_rehearsed else None,
            placed=placed,
        )
    )
    return PruneJob(
        name=name,
        config=config,
        shape=shape,
        plan=widths,
        windows=text.windows,
        calibration=text.source,
        device=target,
        stored=stored,
        dtype=forward,
        copied=forward is not None or next(model.parameters()).device != target,
        distill_tokens=tokens_to_distill(config, widths, text.windows),
        quantization=getattr(model, "dequantized_from", {}),  # as `load` left it
        evaluation=evaluation_texts(text, tokenizer, vocab_size) if config.evaluate else {},
        calibration_info=info,
        speed=speed,
    )


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


@in_eval_mode
def run_beside(model: PreTrainedModel, job: PruneJob, callbacks: Callbacks, budget: int | None = None) -> PruneReport:
    """Prune a copy of a model's layers in memory, measure it and drop it; the model is unchanged.

    Args:
        budget: bytes that may be used on the device; ``None``: what is free.
    """
    memory = LayersInMemory(model)
    return run_stages(job, memory, memory, callbacks, Ranks(), budget)
