"""Everything about a run from folder to folder that can be checked before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimgpt.calibration.documents import local_files
from slimgpt.calibration.evaluation_text import EvaluationText, evaluation_texts
from slimgpt.calibration.generation_limits import fits_whole
from slimgpt.calibration.mixture import AUTO, CalibrationMixture, parse_mixture, read_calibration
from slimgpt.calibration.windows import Calibration
from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.config import PruneConfig
from slimgpt.distillation.data import OnRehearsed
from slimgpt.distillation.schedule import tokens_to_distill
from slimgpt.io.folders import check_output
from slimgpt.models.loading import load_config, load_tokenizer
from slimgpt.models.lookup import check_context, text_config
from slimgpt.models.parameter_counts import ModelShape, describe
from slimgpt.models.source import Source, check_files, fetched, locate
from slimgpt.models.streaming import stored_dtype
from slimgpt.pipeline.speed_target import TIMING, kept_table, known_table, planned
from slimgpt.pipeline.stages import PruneJob
from slimgpt.planning.plan import Plan
from slimgpt.planning.restriction import restricted
from slimgpt.planning.speed_table import SpeedTable, SpeedTarget
from slimgpt.runtime.devices import DTYPES, as_device, as_dtype, forward_dtype
from slimgpt.runtime.distributed import Ranks, local_device, rank_of_environment
from slimgpt.runtime.units import parse_bytes

SIDECAR_BYTES = 64 << 20
"""Bytes that tokenizer, card and report may take beside the weights, generously."""


@dataclass
class PruneRequest:
    """Everything about a run that could be checked without loading weights.

    Args:
        windows: the calibration tokens; without storage where the model has yet to write some of them.
        text: the calibration text as far as it is there.
        evaluation: the texts that the result is compared with the dense model on; empty too where the model has yet to
            write some of the calibration text.
        speed: the target in speed, if there is one.
        whole: whether the model can write text in one piece on the device.
    """

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
    resume: bool
    budget: int | None
    text: CalibrationMixture | None = None
    evaluation: dict[str, EvaluationText] = field(default_factory=dict)
    speed: SpeedTarget | None = None
    whole: bool = True

    @property
    def stored(self) -> torch.dtype:
        """The type of the weights, as they are saved."""
        return stored_dtype(self.source, self.model_config, self.dtype)


def prepare(
    model: str,
    output: str | Path,
    config: PruneConfig,
    calibration: Calibration = AUTO,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    *,
    overwrite: bool = False,
    resume: bool = False,
    memory: str | None = None,
    on_step: OnRehearsed | None = None,
    keep_table: bool = True,
) -> PruneRequest:
    """Check a run from folder to folder before anything long begins: model, plan, output, disk, text.

    Args:
        on_step: called after every timing of layers, where a speed is asked for.
        keep_table: whether times that are measured are written to the file that the settings name.

    Raises:
        SlimGPTError: whatever is wrong with the request.
    """
    target = local_device(as_device(device))
    as_dtype(dtype)
    as_dtype(config.forward_dtype)
    budget = parse_bytes(memory) if memory else None
    # Only rank 0 writes; an output that a killed run had finished is looked at by `finished_before`.
    writes = rank_of_environment() == 0
    path = Path(output).expanduser().absolute()
    finished = resume and (path / REPORT_FILE).is_file()
    source = locate(model)
    if writes:
        texts = [part.source for part in parse_mixture(calibration)] if isinstance(calibration, str) else []
        inputs = [*source.folders, *local_files([*texts, config.plan, config.speed_table])]
        check_output(path, overwrite or finished, inputs=inputs)
    table = kept_table(path) if resume and config.speedup is not None else None
    on_timed = partial(on_step, TIMING) if on_step is not None else None

    def described() -> tuple[Any, ModelShape, torch.dtype]:
        """The model's config, its shape, and the type of its weights."""
        model_config = load_config(source, trust_remote_code)
        if (quantization := source.quantization) is not None:
            quantization.check_library(source.name)
        return model_config, restricted(describe(model_config), config), stored_dtype(source, model_config, dtype)

    def decided(table: SpeedTable | None) -> tuple[Plan, SpeedTarget | None]:
        """The widths that the model is to get, and the target in speed."""
        return planned(
            model_config, config, shape, stored, target, table=table, on_timed=on_timed, keep_table=keep_table
        )

    def check_disk(plan: Plan) -> None:
        if writes and not finished:
            check_output(path, overwrite, plan.parameters * stored.itemsize + SIDECAR_BYTES)

    model_config, shape, stored = described()
    if config.speedup is not None:
        table = known_table(model_config, config, table)
    timed_later = config.speedup is not None and table is None  # once all else is checked, for it takes minutes
    widths = None if timed_later else decided(table)
    if source.folder is None:  # from the hub: what its files hold is known once they are here
        source = fetched(source)
        model_config, shape, stored = described()
        widths = None if timed_later else decided(table)
    if widths is not None:
        check_disk(widths[0])
    check_files(source)
    tokenizer = load_tokenizer(source, trust_remote_code)
    vocab_size = text_config(model_config).vocab_size
    text = read_calibration(calibration, tokenizer, config, vocab_size)
    evaluation = {}
    if config.evaluate and not text.self_written:
        evaluation = evaluation_texts(text.complete()[0], tokenizer, vocab_size)
    check_context(model_config, "calibration windows (--seq-len)", text.windows.shape[1])
    whole = not text.self_written or fits_whole(shape.parameters, stored.itemsize, target, budget, source.name)
    if widths is None:
        widths = decided(None)
        check_disk(widths[0])
    plan, speed = widths
    tokens_to_distill(config, plan, text.windows)
    return PruneRequest(
        source=source,
        output=path,
        model_config=model_config,
        tokenizer=tokenizer,
        config=config,
        shape=shape,
        plan=plan,
        windows=text.windows,
        calibration=text.source,
        device=target,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        resume=resume,
        budget=budget,
        text=text,
        evaluation=evaluation,
        speed=speed,
        whole=whole,
    )


def make_job(request: PruneRequest, ranks: Ranks, tokens: int) -> PruneJob:
    """Input of the stages; processors may differ in speed, so rank 0 chooses the type of the forward passes."""
    stored, quantization = request.stored, request.source.quantization
    held = torch.bfloat16 if _of_few_bits(request) else stored
    fastest = forward_dtype(request.config.forward_dtype, held, request.device) or held
    types = list(DTYPES.values())
    agreed = types[ranks.agree(types.index(fastest))]
    dtype = None if agreed == stored else agreed
    return PruneJob(
        name=request.source.name,
        config=request.config,
        shape=request.shape,
        plan=request.plan,
        windows=request.windows,
        calibration=request.calibration,
        device=request.device,
        stored=stored,
        dtype=dtype,
        copied=dtype is not None or request.device.type != "cpu",
        distill_tokens=tokens,
        evaluation=request.evaluation,
        quantization={} if quantization is None else quantization.to_json(stored),
        speed=request.speed,
    )


def _of_few_bits(request: PruneRequest) -> bool:
    """Whether the weights come from a GGUF file of 16 bits or fewer a number, and run on a CPU.

    They are then saved in float32, so that nothing of them is rounded, which is more than they need to be run in.
    """
    file = request.source.gguf_file
    if file is None or request.device.type != "cpu" or request.source.folder is None:
        return False
    return (request.source.folder / file).stat().st_size < 3 * request.plan.parameters_before
