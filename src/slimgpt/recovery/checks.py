"""Checks of a recovery request, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from slimgpt import assets
from slimgpt.calibration.documents import local_files
from slimgpt.checkpoint.inspecting import read_report
from slimgpt.errors import ModelError, UsageError
from slimgpt.io.folders import check_output
from slimgpt.models.loading import load_config, load_tokenizer
from slimgpt.models.lookup import check_context, check_ids, text_config
from slimgpt.models.parameter_counts import describe
from slimgpt.models.source import Source, check_files, locate
from slimgpt.models.streaming import stored_dtype
from slimgpt.pruning.report import PruneReport
from slimgpt.recovery.config import RecoverConfig, parse_shares
from slimgpt.recovery.dataset import Data, collect
from slimgpt.recovery.trainer import needed_examples
from slimgpt.runtime.devices import as_device, as_dtype
from slimgpt.runtime.distributed import local_device, rank_of_environment


@dataclass
class RecoverRequest:
    """A recovery run with its settings, after every check."""

    source: Source
    output: Path
    model_config: Any
    tokenizer: PreTrainedTokenizerBase
    report: PruneReport | None
    config: RecoverConfig
    sources: tuple[str, ...]
    data: Data
    teacher: tuple[Source, Any] | None
    device: torch.device
    dtype: str
    trust_remote_code: bool


def make_recovery_config(**settings: Any) -> RecoverConfig:
    """Settings by name.

    Raises:
        UsageError: an unknown name or a value outside its range.
    """
    unknown = sorted(settings.keys() - RecoverConfig.__dataclass_fields__.keys())
    if unknown:
        raise UsageError(
            f"recover has no setting '{unknown[0]}'; it has {', '.join(RecoverConfig.__dataclass_fields__)}"
        )
    return RecoverConfig(**settings)


def check_request(
    slim: str | Path,
    out: str | Path,
    data: str | Sequence[str],
    teacher: str | None,
    device: str,
    *,
    dtype: str,
    overwrite: bool,
    trust_remote_code: bool,
    config: RecoverConfig,
) -> RecoverRequest:
    """Check the arguments of :func:`slimgpt.recover` and read the data.

    Raises:
        SlimGPTError: as :func:`slimgpt.recover`.
    """
    if config.adapters and find_spec("peft") is None:
        raise UsageError("adapters need peft: pip install 'slimgpt[recover]', or take --method full")
    if teacher is not None and not config.teacher:
        raise UsageError(f"method {config.method} has no teacher: leave it out, or take method distill")
    target = local_device(as_device(device))
    as_dtype(dtype)
    sources = (data,) if isinstance(data, str) else tuple(data)
    if not sources:
        raise UsageError("no data was given")
    output = Path(out).expanduser().absolute()
    if rank_of_environment() == 0:
        check_output(output, overwrite)
    source = locate(str(slim))
    model_config = load_config(source, trust_remote_code)
    parameters = describe(model_config).parameters
    check_context(model_config, "a max_length", config.max_length)
    check_files(source)
    values = read_report(source.folder) if source.folder is not None else None
    report = PruneReport.from_json(values) if values is not None else None
    dense = _find_teacher(teacher, report, model_config, config, trust_remote_code) if config.teacher else None
    if rank_of_environment() == 0:
        stored = stored_dtype(source, model_config, "auto")
        # The disk holds the result and two training states: weights and both Adam moments in fp32.
        state_bytes = 0 if config.adapters else 2 * 3 * 4
        check_output(
            output,
            overwrite,
            parameters * (stored.itemsize + state_bytes),
            inputs=[*source.folders, *(dense[0].folders if dense is not None else ()), *local_files(sources)],
        )
    tokenizer = load_tokenizer(source, trust_remote_code)
    needed = needed_examples(config)
    examples = collect(
        tokenizer,
        sources,
        config.max_length,
        config.held_out,
        needed,
        pack=config.pack,
        seed=config.seed,
        shares=parse_shares(config.shares),
    )
    vocab_size = text_config(model_config).vocab_size
    for example in (*examples.training, *examples.held_out):
        check_ids(example.ids, vocab_size, "the text to train on")
    return RecoverRequest(
        source, output, model_config, tokenizer, report, config, sources, examples, dense, target, dtype,
        trust_remote_code,
    )  # fmt: skip


def _find_teacher(
    name: str | None, report: PruneReport | None, model_config: Any, config: RecoverConfig, trust_remote_code: bool
) -> tuple[Source, Any]:
    """The dense model and its config, checked against the slim one's."""
    if name is None:
        if report is None:
            raise UsageError("the model has no slimgpt.json that names its dense model; give --teacher")
        name = assets.DEMO if report.base_model == assets.MODEL_NAME else report.base_model
    try:
        source = locate(name)
        teacher_config = load_config(source, trust_remote_code)
        check_files(source)
    except ModelError as error:
        raise ModelError(f"the teacher cannot be read; name the dense model with --teacher: {error}") from error
    for field in ("vocab_size", *(("hidden_size", "num_hidden_layers") if config.layer_weight else ())):
        if getattr(teacher_config, field) != getattr(model_config, field):
            raise UsageError(
                f"the teacher {source.name} has {field} {getattr(teacher_config, field)}, the slim model "
                f"{getattr(model_config, field)}: it is not the model this one was made from"
            )
    if config.top_k > teacher_config.vocab_size:
        raise UsageError(f"top_k is {config.top_k}; the vocabulary has only {teacher_config.vocab_size} tokens")
    return source, teacher_config
