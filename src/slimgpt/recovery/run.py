"""From a slim folder to a recovered one: everything checked first, then the teacher, then training."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from slimgpt import assets
from slimgpt.api import versions
from slimgpt.calibration import local_files
from slimgpt.checkpoint import check_output, save
from slimgpt.checkpoint.folder import output_lock
from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.errors import ModelError, UsageError
from slimgpt.models.heterogeneous import check_context
from slimgpt.models.loading import (
    Source,
    as_device,
    as_dtype,
    check_files,
    forward_dtype,
    load_config,
    load_model,
    load_tokenizer,
    locate,
)
from slimgpt.models.shape import describe
from slimgpt.models.weights import check_finite, fingerprint, source_files
from slimgpt.preparing import stored_dtype
from slimgpt.pruning import PruneReport
from slimgpt.pruning.ranks import Ranks, join, local_device, rank_of_environment
from slimgpt.recovery.curve import Curve, write_curve
from slimgpt.recovery.examples import Data, collect
from slimgpt.recovery.settings import RecoverConfig
from slimgpt.recovery.state import STATE, load_weights, states
from slimgpt.recovery.teacher import TeacherCache
from slimgpt.recovery.trainer import (
    OnStep,
    RecoveryTrainer,
    hopeless,
    needed_examples,
    prepared_model,
    total_steps,
)
from slimgpt.recovery.workspace import Workspace

OnTeacher = Callable[[int, int], None]
"""Called with the examples that the teacher has seen, and all of this process."""


@dataclass(frozen=True)
class Recovery:
    """What a recovery run did; ``slimgpt.json`` and the card carry it.

    Args:
        folder: the recovered model.
        settings: what was asked for, with what was chosen for it.
        data: sources, numbers of examples and predicted tokens, SHA-256 of ids and labels.
        curve: losses by step.
        seconds: wall time of the ``teacher`` and of ``training``, over all resumed parts.
        execution: device, processes, type of the products, the teacher.
        versions: of Python and the libraries.
    """

    folder: Path
    settings: dict[str, Any]
    data: dict[str, Any]
    curve: Curve
    seconds: dict[str, float]
    execution: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, without the folder."""
        values = asdict(self)
        values.pop("folder")
        return values


@dataclass
class _Checked:
    """A request that nothing is wrong with."""

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


def recover(
    slim: str | Path,
    out: str | Path,
    data: str | Sequence[str],
    *,
    teacher: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_teacher: OnTeacher | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Recovery:
    """Train a slim model to win back what pruning lost, and save it as a checkpoint like any other.

    Args:
        slim: the folder that :func:`slimgpt.prune` and :func:`slimgpt.save`, or an earlier recovery, wrote.
        out: the folder to write.
        data: where the text is, one source or several, as for ``calibration``: plain text is packed into windows,
            of instructions (``instruction``, ``input``, ``output``) and chats (``messages``) the answers are learned.
        teacher: the dense model, for ``distill``; the one that ``slimgpt.json`` names if not given.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; under ``torchrun`` every process takes its own GPU.
        dtype: of the weights while they are trained; ``auto``: as stored with adapters, ``float32`` without. The result
            is saved in the type that SLIM has.
        resume: go on where a killed run of the same request stopped; the learning rate may be another.
        overwrite: replace a model folder at ``out``.
        trust_remote_code: let code from the teacher's or the tokenizer's repository run.
        on_teacher: called while the teacher's predictions are taken.
        on_step: called after every update.
        **settings: fields of :class:`slimgpt.recovery.RecoverConfig`.

    Raises:
        UsageError: a setting outside its range, unusable text, or a teacher that does not fit.
        ModelError: a model that cannot be read.
        OutputError: ``out`` exists, or the disk is full.
        ResumeError: an unfinished run that was asked for differently.
        NumericalError: a loss or gradient that is no number; the last good state is kept for ``resume``.
    """
    config = make_recovery_config(**settings)
    checked = _check(slim, out, data, teacher, device, dtype, overwrite, trust_remote_code, config)
    with join(checked.device) as ranks, output_lock(checked.output) if ranks.main else nullcontext():
        return _run(checked, ranks, resume, overwrite, on_teacher, on_step)


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
    if settings.get("shares") is not None:
        settings["shares"] = tuple(settings["shares"])
    return RecoverConfig(**settings)


def _check(
    slim: str | Path,
    out: str | Path,
    data: str | Sequence[str],
    teacher: str | None,
    device: str,
    dtype: str,
    overwrite: bool,
    trust_remote_code: bool,
    config: RecoverConfig,
) -> _Checked:
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
    report = read_report(source)
    found = _find_teacher(teacher, report, model_config, config, trust_remote_code) if config.teacher else None
    if rank_of_environment() == 0:
        stored = stored_dtype(source, model_config, "auto")
        # The result, and two states of what is trained with two moments each in fp32.
        states_take = 0 if config.adapters else 2 * 3 * 4
        check_output(
            output,
            overwrite,
            parameters * (stored.itemsize + states_take),
            inputs=[*source.folders, *local_files(sources)],
        )
    tokenizer = load_tokenizer(source, trust_remote_code)
    needed = needed_examples(config)
    examples = collect(
        tokenizer, sources, config.max_length, config.held_out, needed, config.pack, config.seed, config.shares
    )
    return _Checked(
        source, output, model_config, tokenizer, report, config, sources, examples, found, target, dtype,
        trust_remote_code,
    )  # fmt: skip


def read_report(source: Source) -> PruneReport | None:
    """The report of a slim folder; ``None`` for a model that we did not prune.

    Raises:
        ModelError: its ``slimgpt.json`` is damaged.
    """
    if source.folder is None or not (file := source.folder / REPORT_FILE).is_file():
        return None
    try:
        return PruneReport.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is damaged: {error}") from error


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
        found = load_config(source, trust_remote_code)
        check_files(source)
    except ModelError as error:
        raise ModelError(f"the teacher cannot be read; name the dense model with --teacher: {error}") from error
    for field in ("vocab_size", *(("hidden_size", "num_hidden_layers") if config.layer_weight else ())):
        if getattr(found, field) != getattr(model_config, field):
            raise UsageError(
                f"the teacher {source.name} has {field} {getattr(found, field)}, the slim model "
                f"{getattr(model_config, field)}: it is not the model this one was made from"
            )
    if config.top_k > found.vocab_size:
        raise UsageError(f"top_k is {config.top_k}; the vocabulary has only {found.vocab_size} tokens")
    return source, found


def _run(
    c: _Checked, ranks: Ranks, resume: bool, overwrite: bool, on_teacher: OnTeacher | None, on_step: OnStep | None
) -> Recovery:
    config = c.config
    if config.batch_size % (config.micro_batch * ranks.world):
        raise UsageError(
            f"batch_size {config.batch_size} is no multiple of micro_batch {config.micro_batch} x {ranks.world} "
            "processes"
        )
    work = Workspace(c.output)
    if ranks.main:
        work.open(_request(c, ranks.world), resume, overwrite)
    bf16 = bool(ranks.agree(int(work.choice("bf16", lambda: _bf16(config, c.device)) if ranks.main else 0)))
    seconds = work.seconds
    start = time.perf_counter()
    cache = _teach(c, ranks, work.folder / "teacher", on_teacher)
    if cache is not None and ranks.main:
        work.add_seconds("teacher", time.perf_counter() - start)

    start = time.perf_counter()
    dtype = c.dtype if c.dtype != "auto" or config.adapters else "float32"
    model = load_model(c.source, c.model_config, dtype, c.device, c.trust_remote_code)
    stored = stored_dtype(c.source, c.model_config, "auto")
    set_seed(config.seed)  # adapters begin with random numbers
    trained = prepared_model(model, config)
    pad_id: Any = c.tokenizer.pad_token_id or 0
    trainer = RecoveryTrainer(
        trained, config, c.data.training, c.data.held_out, cache, work.folder / "states",
        pad_id, bf16, c.device, ranks.world, on_step,
    )  # fmt: skip
    try:
        curve = _train(trainer)
    finally:
        if ranks.main:
            work.add_seconds("training", time.perf_counter() - start)
    model = trained.merge_and_unload() if config.adapters else trained  # type: ignore[operator]
    recovery = Recovery(
        folder=c.output,
        settings=asdict(config) | {"learning_rate": config.peak_learning_rate, "data": list(c.sources)},
        data=_described(c),
        curve=curve,
        seconds=dict(seconds),
        execution={
            "device": c.device.type,
            "processes": ranks.world,
            "bf16": bf16,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "teacher": c.teacher[0].name if c.teacher else None,
        },
        versions=versions(c.device),
    )
    if ranks.main:
        _finish(c, model, stored, recovery, overwrite)
        work.discard()
    ranks.agree(0)  # nobody leaves before the folder is there
    return recovery


def _train(trainer: RecoveryTrainer) -> Curve:
    """Train from where the last state is, and leave the best state's weights in the model."""
    kept = states(trainer.folder)
    finished = False
    if kept:
        before = trainer.state.load_from_json(str(kept[-1] / STATE))
        stopped = hopeless(before.log_history, trainer.config.patience)
        finished = stopped or before.global_step >= trainer.args.max_steps
        if finished:
            trainer.state = before
            load_weights(kept[-1], trainer.learner)
    if not finished:
        trainer.args.eval_on_start = not kept and bool(trainer.held_out)
        trainer.train(resume_from_checkpoint=str(kept[-1]) if kept else None)
    best = trainer.best_step
    if best != trainer.state.global_step:
        load_weights(trainer.folder / f"step-{best:08d}", trainer.learner)
    return Curve.from_history(trainer.state.log_history, trainer.args.max_steps, best)


def _teach(c: _Checked, ranks: Ranks, folder: Path, on_teacher: OnTeacher | None) -> TeacherCache | None:
    """The teacher's predictions for the training examples; it is gone from memory afterwards."""
    if c.teacher is None:
        return None
    source, teacher_config = c.teacher
    config = c.config
    hidden = (min(config.layers, teacher_config.num_hidden_layers), teacher_config.hidden_size)
    cache = TeacherCache(folder, c.data.training, config.top_k, hidden if config.layer_weight else None)
    if ranks.main:
        cache.create()
    ranks.agree(0)
    dtype = forward_dtype("auto", torch.bfloat16, c.device)  # None: bfloat16 is the faster one
    name = "auto" if c.device.type == "cuda" else "bfloat16" if dtype is None else "float32"
    teacher: PreTrainedModel = load_model(source, teacher_config, name, c.device, c.trust_remote_code)
    cache.fill(teacher, config.micro_batch, ranks.rank, ranks.world, on_teacher)
    ranks.agree(0)
    cache.open("r")
    return cache


def _bf16(config: RecoverConfig, device: torch.device) -> bool:
    """Whether to multiply in bfloat16: as asked, or where the device is faster at it."""
    if config.bf16 is not None:
        return config.bf16
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and forward_dtype("auto", torch.bfloat16, device) is None


def _request(c: _Checked, world: int) -> dict[str, Any]:
    """Everything that decides the result but the learning rate, which may change after a loss that was no number."""
    found = versions(c.device)
    settings = asdict(c.config)
    settings.pop("learning_rate")
    return {
        "command": "recover",
        "model": {"name": c.source.name, "files": fingerprint(source_files(c.source))},
        "settings": settings,
        "data": _described(c),
        "teacher": c.teacher[0].name if c.teacher else None,
        "dtype": c.dtype,
        "processes": world,
        "versions": {name: found[name] for name in ("slimgpt", "torch", "transformers", "device")},
    }


def _described(c: _Checked) -> dict[str, Any]:
    return {
        "sources": list(c.sources),
        "examples": len(c.data.training),
        "held_out": len(c.data.held_out),
        "predicted_tokens": sum(example.predicted for example in c.data.training),
        "steps": total_steps(c.config, len(c.data.training)),
        "sha256": c.data.digest(),
    }


def _finish(c: _Checked, model: Any, stored: torch.dtype, recovery: Recovery, overwrite: bool) -> None:
    """Save the model with what pruning and recovery say of it."""
    model = model.to("cpu", stored).requires_grad_(False).eval()
    model.config.dtype = stored
    model.config.use_cache = True
    check_finite(model.state_dict().items())
    report = None
    if c.report is not None:
        report = replace(c.report, recovery=(*c.report.recovery, recovery.to_json()))
    save(model, c.tokenizer, report, c.output, overwrite, lambda folder: write_curve(folder, recovery.to_json()))
