"""The functions behind ``import slimgpt`` and behind every command."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.calibration import digest, sample_windows
from slimgpt.checkpoint import check_output, save
from slimgpt.config import PruneConfig, parse_schedule
from slimgpt.errors import CalibrationError, UsageError
from slimgpt.evaluation import Perplexity, perplexity
from slimgpt.models.heterogeneous import layer_sizes
from slimgpt.models.loading import (
    Source,
    as_device,
    as_dtype,
    check_files,
    load_config,
    load_model,
    load_tokenizer,
    locate,
)
from slimgpt.models.shape import ModelShape, describe
from slimgpt.planning import Plan, make_plan
from slimgpt.pruning import LayerReport, PruneReport, prune_layers
from slimgpt.solver import CRITERIA

OnLayer = Callable[[LayerReport, Plan], None]
"""Called after every layer, with what was done to it and the whole plan."""

SIDE_FILES = 64 << 20
"""Bytes that tokenizer, card and report may take beside the weights, generously."""


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
    on_layer: OnLayer | None = None,
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
        method: ``slimgpt``, ``paper``, or a baseline: ``magnitude``, ``wanda``, ``random``.
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
        on_layer: called after every layer.

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
    )
    target, wanted = as_device(device), as_dtype(dtype)
    shape = describe(model.config, model)
    plan = plan_for(model.config, config, shape)
    windows, source = calibration_windows(calibration, tokenizer, config, model.config.vocab_size)
    if isinstance(wanted, torch.dtype):
        model.to(wanted)  # type: ignore[arg-type]
        model.config.dtype = wanted
    name = str(model.config.name_or_path or type(model).__name__)
    return run_plan(model, name, windows, source, plan, config, target, on_layer)


def make_config(**settings: Any) -> PruneConfig:
    """Settings, with the method checked.

    Raises:
        UsageError: a value outside its range or an unknown method.
    """
    schedule = settings.get("schedule")
    if isinstance(schedule, str):
        settings["schedule"] = parse_schedule(schedule)
    elif schedule is not None:
        settings["schedule"] = tuple(schedule)
    config = PruneConfig(**settings)
    if config.method not in CRITERIA:
        raise UsageError(f"method '{config.method}' is unknown; choose {', '.join(CRITERIA)}")
    return config


def plan_for(model_config: Any, config: PruneConfig, shape: ModelShape) -> Plan:
    """The plan that the settings ask for.

    ``paper`` removes whole heads as published; the other methods take the finer unit where there is one.
    """
    head_unit = "kv" if config.head_unit == "auto" and config.method == "paper" else config.head_unit
    return make_plan(model_config, config.ratio, config.schedule, head_unit, config.round_to, config.uniform, shape)


def calibration_windows(
    calibration: str | Tensor, tokenizer: PreTrainedTokenizerBase | None, config: PruneConfig, vocab_size: int
) -> tuple[Tensor, str]:
    """Token ids ``(num_samples, seq_len)`` and the name of where they come from.

    Raises:
        CalibrationError: unreadable or too little text, or a tensor that holds no token ids.
    """
    if isinstance(calibration, Tensor):
        integral = not (calibration.is_floating_point() or calibration.is_complex())
        if calibration.ndim != 2 or not integral or calibration.numel() == 0:
            raise CalibrationError(
                f"calibration is a tensor of shape {tuple(calibration.shape)} and {calibration.dtype}; "
                "give token ids as a LongTensor (num_samples, seq_len)"
            )
        if int(calibration.min()) < 0 or int(calibration.max()) >= vocab_size:
            raise CalibrationError(f"calibration holds ids outside the vocabulary of {vocab_size} tokens")
        return calibration.long(), "tensor"
    if tokenizer is None:
        raise CalibrationError("without a tokenizer, calibration must be a LongTensor of token ids")
    return sample_windows(tokenizer, calibration, config.num_samples, config.seq_len, config.seed), calibration


def run_plan(
    model: PreTrainedModel,
    name: str,
    windows: Tensor,
    source: str,
    plan: Plan,
    config: PruneConfig,
    device: torch.device,
    on_layer: OnLayer | None,
) -> PruneReport:
    """Drive the loop over the layers and gather its reports."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and windows.shape[1] > longest:
        raise CalibrationError(
            f"windows of {windows.shape[1]} tokens are longer than the model's context of {longest}; lower --seq-len"
        )
    start = time.perf_counter()
    dense = tuple(layer_sizes(model.config))
    reports = []
    for report in prune_layers(model, windows, plan, config, device):
        reports.append(report)
        if on_layer:
            on_layer(report, plan)
    return PruneReport(
        base_model=name,
        model_type=model.config.model_type,
        settings=config,
        plan=plan,
        dense_sizes=dense,
        layers=tuple(reports),
        calibration={
            "source": source,
            "num_samples": windows.shape[0],
            "seq_len": windows.shape[1],
            "sha256": digest(windows),
        },
        versions=versions(device),
        seconds=time.perf_counter() - start,
    )


def versions(device: torch.device) -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("slimgpt", "torch", "transformers", "safetensors")}
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return found


@dataclass
class Prepared:
    """Everything about a run that could be checked without loading weights."""

    source: Source
    output: Path
    model_config: Any
    tokenizer: PreTrainedTokenizerBase
    config: PruneConfig
    shape: ModelShape
    plan: Plan
    windows: Tensor
    calibration: str
    device: torch.device
    dtype: str
    trust_remote_code: bool
    overwrite: bool


def prepare(
    model: str,
    output: str | Path,
    config: PruneConfig,
    calibration: str = assets.DEMO,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Prepared:
    """Check a run from folder to folder before anything long begins: model, plan, output, disk, text.

    Raises:
        SlimGPTError: whatever is wrong with the request.
    """
    target = as_device(device)
    as_dtype(dtype)
    path = check_output(output, overwrite)
    source = locate(model)
    model_config = load_config(source, trust_remote_code)
    shape = describe(model_config)
    plan = plan_for(model_config, config, shape)
    stored = str(model_config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    bytes_each = 2 if stored in ("float16", "bfloat16") else 4
    check_output(output, overwrite, plan.parameters * bytes_each + SIDE_FILES)
    check_files(source)
    tokenizer = load_tokenizer(source, trust_remote_code)
    windows, text = calibration_windows(calibration, tokenizer, config, model_config.vocab_size)
    return Prepared(
        source=source,
        output=path,
        model_config=model_config,
        tokenizer=tokenizer,
        config=config,
        shape=shape,
        plan=plan,
        windows=windows,
        calibration=text,
        device=target,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )


def execute(
    prepared: Prepared, model: PreTrainedModel | None = None, on_layer: OnLayer | None = None
) -> tuple[PreTrainedModel, PruneReport]:
    """Load (unless the model is given) and prune what :func:`prepare` has checked."""
    p = prepared
    if model is None:
        model = load_model(p.source, p.model_config, p.dtype, "cpu", p.trust_remote_code)
    report = run_plan(model, p.source.name, p.windows, p.calibration, p.plan, p.config, p.device, on_layer)
    return model, report


def prune_folder(
    model: str,
    output: str | Path,
    ratio: float | None = None,
    calibration: str = assets.DEMO,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_layer: OnLayer | None = None,
    **settings: Any,
) -> PruneReport:
    """Prune from a model's name to a new folder, with everything checked before the weights are loaded.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or ``demo``.
        output: the folder to write.
        dtype: of the weights: ``auto`` (as stored), ``float32``, ``float16`` or ``bfloat16``.
        trust_remote_code: let config and tokenizer run Python code from the model's repository.
        overwrite: replace a model folder of that name.
        settings: the other keywords of :func:`prune`.

    Raises:
        SlimGPTError: as :func:`prune`, and for a model or an output folder that is refused.
    """
    config = make_config(ratio=ratio, **settings)
    prepared = prepare(model, output, config, calibration, device, dtype, trust_remote_code, overwrite)
    slim, report = execute(prepared, on_layer=on_layer)
    save(slim, prepared.tokenizer, report, prepared.output, overwrite)
    return report


def with_evaluation(report: PruneReport, **evaluation: Any) -> PruneReport:
    """A report with figures added that were taken after pruning."""
    return replace(report, evaluation={**report.evaluation, **evaluation})


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of a model on a text file; see :func:`slimgpt.evaluation.perplexity` for the protocol.

    Args:
        text: the path of a text file, or ``demo`` (the held-out speeches).

    Raises:
        UsageError: the file cannot be read, or the window does not fit.
    """
    return perplexity(model, tokenizer, read_text(text), window, max_tokens, batch_size, progress)


def read_text(name: str) -> str:
    """The text of a file, or of ``demo``: the held-out speeches.

    Raises:
        CalibrationError: the file cannot be read.
    """
    if name == assets.DEMO:
        return "\n\n".join(assets.demo_documents()[1])
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read the text {name}: {error}") from error
