"""From a slim folder to a recovered one: everything checked first, then the teacher, then training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from slimgpt.checkpoint.saving import save
from slimgpt.errors import UsageError
from slimgpt.io.folders import output_lock
from slimgpt.models.fingerprint import fingerprint, source_files
from slimgpt.models.loading import load_model
from slimgpt.models.streaming import check_finite, stored_dtype
from slimgpt.recovery.checks import RecoverRequest, _check, make_recovery_config
from slimgpt.recovery.config import RecoverConfig
from slimgpt.recovery.loss_curve import Curve, write_curve
from slimgpt.recovery.resume import Workspace
from slimgpt.recovery.teacher_cache import TeacherCache
from slimgpt.recovery.train_state import STATE, load_weights, states
from slimgpt.recovery.trainer import (
    OnStep,
    RecoveryTrainer,
    make_trainable,
    should_stop_early,
    total_steps,
)
from slimgpt.runtime.devices import forward_dtype
from slimgpt.runtime.distributed import Ranks, join
from slimgpt.runtime.versions import versions

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
    checked = _check(
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
    with join(checked.device) as ranks, output_lock(checked.output) if ranks.main else nullcontext():
        return _run(checked, ranks, resume, overwrite, on_teacher, on_step)


def _run(
    c: RecoverRequest, ranks: Ranks, resume: bool, overwrite: bool, on_teacher: OnTeacher | None, on_step: OnStep | None
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
    trained = make_trainable(model, config)
    pad_id: Any = c.tokenizer.pad_token_id or 0
    trainer = RecoveryTrainer(
        trained, config, c.data.training, c.data.held_out, cache=cache, folder=work.folder / "states",
        pad_id=pad_id, bf16=bf16, device=c.device, world=ranks.world, on_step=on_step,
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
        stopped = should_stop_early(before.log_history, trainer.config.patience)
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


def _teach(c: RecoverRequest, ranks: Ranks, folder: Path, on_teacher: OnTeacher | None) -> TeacherCache | None:
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


def _request(c: RecoverRequest, world: int) -> dict[str, Any]:
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


def _described(c: RecoverRequest) -> dict[str, Any]:
    return {
        "sources": list(c.sources),
        "examples": len(c.data.training),
        "held_out": len(c.data.held_out),
        "predicted_tokens": sum(example.predicted for example in c.data.training),
        "steps": total_steps(c.config, len(c.data.training)),
        "sha256": c.data.digest(),
    }


def _finish(c: RecoverRequest, model: Any, stored: torch.dtype, recovery: Recovery, overwrite: bool) -> None:
    """Save the model with what pruning and recovery say of it."""
    model = model.to("cpu", stored).requires_grad_(False).eval()
    model.config.dtype = stored
    model.config.use_cache = True
    check_finite(model.state_dict().items())
    report = None
    if c.report is not None:
        report = replace(c.report, recovery=(*c.report.recovery, recovery.to_json()))
    save(model, c.tokenizer, report, c.output, overwrite, lambda folder: write_curve(folder, recovery.to_json()))
