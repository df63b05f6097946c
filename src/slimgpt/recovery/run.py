"""Recovery of a slim folder: checks, teacher predictions, training, saving."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from slimgpt.calibration.documents import hub_dataset
from slimgpt.checkpoint.hub import check_repository
from slimgpt.checkpoint.journal import unfinished_folder
from slimgpt.checkpoint.saving import save
from slimgpt.errors import UsageError
from slimgpt.io.folders import output_lock
from slimgpt.io.result import Result
from slimgpt.models.fingerprint import name_and_files
from slimgpt.models.loading import load_model
from slimgpt.models.streaming import check_finite, stored_dtype
from slimgpt.recovery.checks import RecoverRequest, check_request, make_recovery_config
from slimgpt.recovery.config import RecoverConfig
from slimgpt.recovery.figures import figures_after_training
from slimgpt.recovery.loading import learner, load_divided, load_learner
from slimgpt.recovery.loss_curve import Curve, write_curve
from slimgpt.recovery.resume import Workspace
from slimgpt.recovery.sharding import shard
from slimgpt.recovery.teacher_cache import TeacherCache
from slimgpt.recovery.train_state import load_progress, load_weights, states
from slimgpt.recovery.trainer import (
    SEEDS_OF_NUMPY,
    OnStep,
    RecoveryTrainer,
    make_trainable,
    should_stop_early,
    total_steps,
)
from slimgpt.runtime.devices import dtype_name, forward_dtype
from slimgpt.runtime.distributed import Ranks, join, rank_of_environment
from slimgpt.runtime.interrupts import interrupts_restored
from slimgpt.runtime.memory import malloc_trim
from slimgpt.runtime.settings import has_settings
from slimgpt.runtime.versions import resume_versions, versions

OnTeacher = Callable[[int, int], None]
"""Called with the number of examples the teacher has processed, and their total, in this process."""


@dataclass(frozen=True, repr=False)
class Recovery(Result):
    """Result of a recovery run, stored in ``slimgpt.json`` and the model card.

    Args:
        folder: the recovered model.
        settings: the :class:`RecoverConfig`, with the learning rate that was used, and the sources of data.
        data: sources, numbers of examples, predicted tokens and rows left out, SHA-256 of ids and labels.
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


@has_settings(RecoverConfig, before={"on_teacher": ""})
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
    push_to_hub: str | None = None,
    private: bool = False,
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
        push_to_hub: a repository of the hub, such as ``me/slim``, that the finished folder is uploaded to; token and
            name are checked before the training. With ``overwrite``, files that are there give way.
        private: a new repository is seen by its owner only.
        **settings: the fields of :class:`slimgpt.recovery.RecoverConfig`.

    Raises:
        UsageError: a setting outside its range, unusable text, or a teacher that does not fit.
        ModelError: a model that cannot be read.
        OutputError: ``out`` exists, or the disk is full.
        ResumeError: an unfinished run that was asked for differently.
        NumericalError: a loss or gradient that is no number; the last good state is kept for ``resume``.
    """
    config = make_recovery_config(**settings)
    request = check_request(
        slim,
        out,
        data,
        teacher,
        device,
        dtype=dtype,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        config=config,
    )
    main = rank_of_environment() == 0
    repository = check_repository(push_to_hub, private=private, overwrite=overwrite) if main else None
    with join(request.device) as ranks, output_lock(request.output) if ranks.main else nullcontext():
        try:
            recovery = _run(request, ranks, resume, overwrite, on_teacher, on_step)
        except KeyboardInterrupt:
            folder = unfinished_folder(request.output)
            if not (ranks.main and folder.is_dir()):
                raise
            raise KeyboardInterrupt(f"what is finished is kept in {folder}; go on with --resume") from None
    if repository is not None:
        repository.upload(request.output)
    return recovery


@interrupts_restored()
def _run(
    request: RecoverRequest,
    ranks: Ranks,
    resume: bool,
    overwrite: bool,
    on_teacher: OnTeacher | None,
    on_step: OnStep | None,
) -> Recovery:
    config = request.config
    if config.shard and ranks.world == 1:
        raise UsageError(
            "shard divides the model among processes, and this is one alone; start several with torchrun "
            "--nproc-per-node N -m slimgpt recover, or leave it out"
        )
    if config.batch_size % (config.micro_batch * ranks.world):
        raise UsageError(
            f"batch_size {config.batch_size} is no multiple of micro_batch {config.micro_batch} x {ranks.world} "
            "processes"
        )
    workspace = Workspace(request.output)
    if ranks.main:
        workspace.open(_resume_request(request), resume, overwrite)
    bf16 = bool(ranks.agree(int(workspace.choice("bf16", lambda: _bf16(config, request.device)) if ranks.main else 0)))
    seconds = workspace.seconds
    start = time.perf_counter()
    cache = _cache_teacher(request, ranks, workspace.folder / "teacher", on_teacher)
    if cache is not None and ranks.main:
        workspace.add_seconds("teacher", time.perf_counter() - start)

    start = time.perf_counter()
    model, dtype = load_divided(request, *learner(request)) if config.shard else (load_learner(request), None)
    set_seed(config.seed % SEEDS_OF_NUMPY)  # adapters begin with random numbers
    trained = make_trainable(model, config)
    if config.shard:
        shard(trained, model, request.device, ranks, dtype)
    pad_id: Any = request.tokenizer.pad_token_id or 0
    trainer = RecoveryTrainer(
        trained, config, request.data.training, request.data.held_out, cache=cache, folder=workspace.folder / "states",
        pad_id=pad_id, bf16=bf16, device=request.device, ranks=ranks, on_step=on_step,
        logs=request.output.parent / "runs" / request.output.name,
    )  # fmt: skip
    try:
        curve, kept = _train(trainer)
    finally:
        if ranks.main:
            workspace.add_seconds("training", time.perf_counter() - start)
    trained_in = dtype_name(next(model.parameters()).dtype)
    if config.shard:  # the first process has the trained weights in the kept state, and none of the others needs them
        trainer.accelerator.free_memory()  # it keeps model and optimizer, too
        del trainer, model, trained
        gc.collect()
        malloc_trim()
        if ranks.main:
            trained = make_trainable(load_learner(request), config)
            load_weights(kept, trained)
    elif ranks.main:
        load_weights(kept, trained)
    recovery = Recovery(
        folder=request.output,
        settings=asdict(config) | {"learning_rate": config.peak_learning_rate, "data": list(request.sources)},
        data=_describe_data(request),
        curve=curve,
        seconds=dict(seconds),
        execution={
            "device": request.device.type,
            "processes": ranks.world,
            "bf16": bf16,
            "dtype": trained_in,
            "sharded": config.shard,
            "teacher": request.teacher[0].name if request.teacher else None,
        },
        versions=versions(request.device),
    )
    if ranks.main:
        model = trained.merge_and_unload() if config.adapters else trained  # type: ignore[operator]
        _save(request, model, recovery, overwrite)
        workspace.discard()
    ranks.agree(0)  # other processes wait until the folder exists
    return recovery


def _train(trainer: RecoveryTrainer) -> tuple[Curve, Path]:
    """Train from the last saved state; the curve, and the state of the best step, whose weights are to be taken."""
    saved = states(trainer.folder)
    finished = False
    if saved:
        before = load_progress(saved[-1])
        stopped = should_stop_early(before.log_history, trainer.config.patience)
        finished = stopped or before.global_step >= trainer.args.max_steps
        if finished:
            trainer.state = before
    if not finished:
        trainer.args.eval_on_start = not saved and bool(trainer.held_out)
        trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    best = trainer.best_step
    curve = Curve.from_history(trainer.state.log_history, trainer.args.max_steps, best)
    return curve, trainer.folder / f"step-{best:08d}"


def _cache_teacher(
    request: RecoverRequest, ranks: Ranks, folder: Path, on_teacher: OnTeacher | None
) -> TeacherCache | None:
    """Cache the teacher's predictions for the training examples; the teacher is freed afterwards."""
    if request.teacher is None:
        return None
    source, teacher_config = request.teacher
    config = request.config
    hidden = (min(config.layers, teacher_config.num_hidden_layers), teacher_config.hidden_size)
    cache = TeacherCache(folder, request.data.training, config.top_k, hidden if config.layer_weight else None)
    if ranks.main:
        cache.create()
        if cache.complete:
            cache.check()
    if not ranks.agree(int(cache.complete)):
        dtype = forward_dtype("auto", torch.bfloat16, request.device)  # None: bfloat16 is the faster one
        name = "auto" if request.device.type == "cuda" else "bfloat16" if dtype is None else "float32"
        if config.shard:
            teacher, wider = load_divided(request, source, teacher_config, name)
            shard(teacher, teacher, request.device, ranks, wider)
        else:
            teacher = load_model(source, teacher_config, name, request.device, request.trust_remote_code)
        cache.fill(teacher, config.micro_batch, ranks, on_teacher)
        ranks.agree(0)
        if ranks.main:
            cache.mark_complete()
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


def _resume_request(request: RecoverRequest) -> dict[str, Any]:
    """The settings a resumed run must share: all but the number of processes and what they share, where the course is
    reported, and the learning rate, which may be lowered after a NaN loss."""
    settings = asdict(request.config)
    for name in ("learning_rate", "shard", "report_to"):
        settings.pop(name)
    return {
        "command": "recover",
        "model": name_and_files(request.source),
        "settings": settings,
        "data": _describe_data(request),
        "teacher": name_and_files(request.teacher[0]) if request.teacher else None,
        "dtype": request.dtype,
        "versions": resume_versions(request.device),
    }


def _describe_data(request: RecoverRequest) -> dict[str, Any]:
    return {
        "sources": list(request.sources),
        "datasets": [name for source in request.sources if (name := hub_dataset(source))],
        "examples": len(request.data.training),
        "held_out": len(request.data.held_out),
        "predicted_tokens": sum(example.predicted for example in request.data.training),
        "steps": total_steps(request.config, len(request.data.training)),
        "rows_left_out": {"without_answer": request.data.without_answer, "refused": request.data.refused},
        "sha256": request.data.digest(),
    }


def _save(request: RecoverRequest, model: Any, recovery: Recovery, overwrite: bool) -> None:
    """Save the model with the reports of pruning and recovery."""
    stored = stored_dtype(request.source, request.model_config, "auto")
    model = model.to("cpu", stored).requires_grad_(False).eval()
    model.config.dtype = stored
    model.config.use_cache = True
    check_finite(model.state_dict().items())
    report = None
    if request.report is not None:
        # What was measured before the training is of another model.
        report = replace(
            request.report,
            recovery=(*request.report.recovery, recovery.to_json()),
            evaluation=figures_after_training(request, model),
        )
    save(
        model,
        request.tokenizer,
        report,
        request.output,
        overwrite,
        lambda folder: write_curve(folder, recovery.to_json()),
    )
