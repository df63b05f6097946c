"""From a model's name to a folder: everything checked first, layers brought in and written out one at a time."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimgpt.calibration.mixture import AUTO
from slimgpt.calibration.windows import Calibration
from slimgpt.checkpoint.hub import check_repository
from slimgpt.checkpoint.journal import SELF_WRITTEN, Journal
from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.config import make_config
from slimgpt.distillation.data import OnRehearsed
from slimgpt.distillation.schedule import disk_to_distill, tokens_to_distill
from slimgpt.distillation.trainer import OnDistilled
from slimgpt.errors import NumericalError, RankError
from slimgpt.io.folders import check_output, clear_leftovers, output_lock
from slimgpt.models.build import architecture_of, empty_model
from slimgpt.models.fingerprint import name_and_files
from slimgpt.pipeline.callbacks import Callbacks, OnLayer, with_bars
from slimgpt.pipeline.journal_sink import JournalSink
from slimgpt.pipeline.prepare import SIDECAR_BYTES, PruneRequest, make_job, prepare
from slimgpt.pipeline.self_written import KeptRounds, described_before, with_self_written
from slimgpt.pipeline.stages import PruneJob, run_stages
from slimgpt.pipeline.weights_source import open_model
from slimgpt.pruning.report import PruneReport
from slimgpt.runtime.devices import dtype_name
from slimgpt.runtime.distributed import Ranks, join, rank_of_environment
from slimgpt.runtime.interrupts import interrupts_ignored, interrupts_restored
from slimgpt.runtime.memory import free_bytes, limit_gpu_memory
from slimgpt.runtime.versions import versions
from slimgpt.sensitivity.measure import OnMeasured


def run_to_folder(request: PruneRequest, callbacks: Callbacks | None = None) -> PruneReport:
    """Prune what :func:`prepare` has checked and write the folder; other processes of a distributed run take part.

    Finished layers are kept on disk beside the folder until it is whole, so that a killed run can be resumed.

    Raises:
        SlimGPTError: as :func:`slimgpt.prune`; :class:`ResumeError` where there is an unfinished run of something else.
    """
    callbacks = callbacks or Callbacks()
    with join(request.device) as ranks, output_lock(request.output) if ranks.main else nullcontext():
        tokens = tokens_to_distill(request.config, request.plan, request.windows)
        empty = empty_model(request.model_config)
        if tokens and ranks.main and not request.resume:
            _check_disk(request, empty, tokens)
        job = make_job(request, ranks, tokens)
        if ranks.main:
            absent = not request.output.exists()
            clear_leftovers(request.output)
            if absent and request.output.exists():  # a killed process was replacing it
                check_output(request.output, request.overwrite)
        journal = Journal(request.output, architecture_of(request.model_config, empty).layers, _request(request, job))
        job = replace(job, request=hashlib.sha256(json.dumps(journal.request, sort_keys=True).encode()).hexdigest())
        before = finished_before(request, journal, job.request) if ranks.main and request.resume else None
        if ranks.agree(int(before is not None)):
            if before is None:
                raise SystemExit(0)
            return before
        finished = ranks.agree(journal.open(request.resume, request.overwrite) if ranks.main else 0)
        if request.device.type == "cuda" and request.budget is not None:
            limit_gpu_memory(request.device, request.budget)
        try:
            return _run_in_memory(request, job, journal, callbacks, ranks, finished)
        except BaseException as error:
            with interrupts_ignored():
                if ranks.main and isinstance(error, NumericalError):
                    journal.discard()  # the same command would fail in the same layer again
                kept = ranks.main and journal.close()
            if kept and isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"what is finished is kept in {journal.folder}; go on with --resume") from None
            raise


@interrupts_restored()
def _run_in_memory(
    request: PruneRequest, job: PruneJob, journal: Journal, callbacks: Callbacks, ranks: Ranks, finished: int
) -> PruneReport:
    """Run the stages; where the device runs out of memory, go on behind the finished layers with a smaller budget."""
    budget = request.budget
    while True:
        try:
            source = open_model(request)
            rounds = KeptRounds(journal.folder / SELF_WRITTEN)
            job = with_self_written(request, job, source, ranks, rounds, callbacks.prepare_step)
            readers = ranks if ranks.see(journal.scratch) else ranks.first(1)
            sink = JournalSink(request, journal, source.model, ranks, readers)
            return run_stages(job, source, sink, callbacks, ranks, budget, finished)
        except torch.OutOfMemoryError as error:
            budget = reduced_budget(request, budget, ranks, error)
            finished = journal.open(resume=True)


def _check_disk(request: PruneRequest, empty: PreTrainedModel, tokens: int) -> None:
    """Refuse a training whose files the disk has no room for: every layer is there twice meanwhile, as the repair left
    it and as it was trained.

    Raises:
        OutputError: with what is needed.
    """
    itemsize = request.stored.itemsize
    parameters = request.plan.parameters + round(request.shape.layer_parameters * (1 - request.plan.achieved))
    needed = parameters * itemsize + SIDECAR_BYTES
    needed += disk_to_distill(empty, request.config, request.plan, request.windows, tokens, itemsize, request.device)
    check_output(request.output, request.overwrite, needed)


def reduced_budget(request: PruneRequest, budget: int | None, ranks: Ranks, error: torch.OutOfMemoryError) -> int:
    """The next budget to try when the estimate was too low and the device ran out of memory.

    Raises:
        RankError: several processes would have to agree; the run is to be started again.
    """
    if ranks.world > 1:
        raise RankError(
            f"the device of process {ranks.rank} ran out of memory; start the same command with --resume and a smaller "
            "--memory"
        ) from error
    if request.device.type == "cuda":
        torch.cuda.empty_cache()
    before = budget if budget is not None else free_bytes(request.device)
    return int(0.75 * before)


def finished_before(request: PruneRequest, journal: Journal, digest: str) -> PruneReport | None:
    """The report of this very run if its output is whole: it was killed on its last steps, or is asked for again.

    Raises:
        OutputError: the output holds something else.
    """
    file = request.output / REPORT_FILE
    if not file.is_file():
        return None
    with suppress(ValueError, TypeError, KeyError):
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["request"] == digest:
            report = PruneReport.from_json(values)
            journal.discard()
            return report
    check_output(request.output, request.overwrite)
    return None


def _request(request: PruneRequest, job: PruneJob) -> dict[str, Any]:
    """Everything that decides the result."""
    installed = versions(request.device)
    return {
        "model": name_and_files(request.source),
        "settings": asdict(request.config),
        "plan": request.plan.to_json(),
        "calibration": described_before(request),
        "dtype": dtype_name(request.stored),
        "forward_dtype": dtype_name(job.dtype or job.stored),
        "versions": {name: installed[name] for name in ("slimgpt", "torch", "transformers", "device")},
        **({} if request.speed is None else {"speed_table": request.speed.table.to_json()}),
    }


def prune_folder(
    model: str,
    output: str | Path,
    ratio: float | None = None,
    calibration: Calibration = AUTO,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    memory: str | None = None,
    on_layer: OnLayer | None = None,
    on_measured: OnMeasured | None = None,
    on_distilled: OnDistilled | None = None,
    on_rehearsed: OnRehearsed | None = None,
    progress: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    **settings: Any,
) -> PruneReport:
    """Prune from a model's name to a new folder, layer by layer; the model need not fit into memory.

    Args:
        model: a hub id, a local folder, a ``.gguf`` file, or ``demo``.
        output: the folder to write.
        dtype: of the weights: ``auto`` (as stored), ``float32``, ``float16`` or ``bfloat16``.
        trust_remote_code: let config and tokenizer run Python code from the model's repository.
        overwrite: replace a model folder of that name.
        resume: go on with a run that was killed; a first run simply begins.
        progress: show a bar for every phase.
        push_to_hub: a repository of the hub, such as ``me/slim``, that the finished folder is uploaded to; token and
            name are checked before the run. With ``overwrite``, files that are there give way.
        private: a new repository is seen by its owner only.
        settings: the other keywords of :func:`prune`.

    Raises:
        SlimGPTError: as :func:`prune`, and for a model or an output folder that is refused.
    """
    config = make_config(ratio=ratio, **settings)
    main = rank_of_environment() == 0
    callbacks = Callbacks(on_layer, on_measured, on_distilled, on_rehearsed)
    callbacks = with_bars(callbacks) if progress and main else callbacks
    request = prepare(
        model,
        output,
        config,
        calibration,
        device,
        dtype,
        trust_remote_code,
        overwrite=overwrite,
        resume=resume,
        memory=memory,
        on_step=callbacks.prepare_step,
    )
    repository = check_repository(push_to_hub, private=private, overwrite=overwrite) if main else None
    report = run_to_folder(request, callbacks)
    if repository is not None:
        repository.upload(request.output)
    return report
