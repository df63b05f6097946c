"""From a model's name to a folder: everything checked first, layers brought in and written out one at a time."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimgpt import assets
from slimgpt.checkpoint.assemble_folder import assemble
from slimgpt.checkpoint.journal import Journal, reading, write_text
from slimgpt.checkpoint.saving import REPORT_FILE
from slimgpt.config import make_config
from slimgpt.distillation.data import OnRehearsed, build_distillation_data
from slimgpt.distillation.schedule import disk_to_distill, pruning_split, tokens_to_distill
from slimgpt.distillation.trainer import Distillation, OnDistilled
from slimgpt.errors import NumericalError, RankError
from slimgpt.io.folders import check_output, output_lock
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.build import architecture_of, decoder_layers, empty_model, rebuild_layer
from slimgpt.models.fingerprint import fingerprint, source_files
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.source import weights_folder
from slimgpt.pipeline.in_memory import OnLayer
from slimgpt.pipeline.prepare import SIDECAR_BYTES, PruneRequest, prepare
from slimgpt.pipeline.weights_source import LayerSource, open_model
from slimgpt.planning.plan import Plan, plan_of_widths
from slimgpt.pruning.loop import prune_layers
from slimgpt.pruning.memory_estimate import memory_need
from slimgpt.pruning.report import PruneReport, described, execution
from slimgpt.runtime.devices import DTYPES, forward_dtype
from slimgpt.runtime.distributed import Ranks, join
from slimgpt.runtime.memory import Placement, choose_placement, free_bytes, limit_gpu_memory
from slimgpt.runtime.versions import versions
from slimgpt.sensitivity.allocate import allocate, uses_sensitivity
from slimgpt.sensitivity.measure import OnMeasured

PLAN_FILE = "plan.json"
"""In the journal's folder: the widths that were chosen by measurement."""

OnStart = Callable[[Placement, int], None]
"""Called before the first layer, with where activations are kept and the number of layers that are finished."""


def run_to_folder(
    prepared: PruneRequest,
    on_layer: OnLayer | None = None,
    on_start: OnStart | None = None,
    on_measured: OnMeasured | None = None,
    on_distilled: OnDistilled | None = None,
    on_rehearsed: OnRehearsed | None = None,
) -> PruneReport:
    """Prune what :func:`prepare` has checked and write the folder; other processes of a distributed run take part.

    Finished layers are kept on disk beside the folder until it is whole, so that a killed run can be resumed.

    Raises:
        SlimGPTError: as :func:`slimgpt.prune`; :class:`ResumeError` where there is an unfinished run of something else.
    """
    p = prepared
    with join(p.device) as ranks, output_lock(p.output) if ranks.main else nullcontext():
        tokens = tokens_to_distill(p.config, p.shape, p.plan, p.windows)
        windows = ranks.share(pruning_split(p.windows, tokens))
        stored = p.stored
        empty = empty_model(p.model_config)
        if tokens and ranks.main and not p.resume:
            # Every layer is there twice meanwhile, as the repair left it and as it was trained.
            parameters = p.plan.parameters + round(p.shape.layer_parameters * (1 - p.plan.achieved))
            needed = parameters * stored.itemsize + SIDECAR_BYTES
            needed += disk_to_distill(empty, p.config, p.plan, p.windows, tokens, stored.itemsize, p.device)
            check_output(p.output, p.overwrite, needed)
        dtype = forward_dtype(p.config.forward_dtype, stored, p.device)
        names = list(DTYPES.values())
        dtype = names[ranks.agree(names.index(dtype or stored))]  # processors may differ; rank 0's timing counts
        dtype = None if dtype == stored else dtype
        request = _request(p, dtype or stored)
        journal = Journal(p.output, architecture_of(p.model_config, empty).layers, request)
        request_digest = hashlib.sha256(json.dumps(journal.request, sort_keys=True).encode()).hexdigest()
        before = finished_before(p, journal, request_digest) if ranks.main and p.resume else None
        if ranks.agree(int(before is not None)):
            if before is None:
                raise SystemExit(0)
            return before
        done = journal.open(p.resume, p.overwrite) if ranks.main else 0
        done = ranks.agree(done)
        calls = _Calls(on_layer, on_start, on_measured, on_distilled, on_rehearsed)
        run, budget = _FolderRun(p, ranks, windows, tokens, dtype, journal, request_digest, calls), p.budget
        try:
            while True:
                try:
                    return run(done, budget)
                except torch.OutOfMemoryError as error:
                    budget = reduced_budget(p, budget, ranks, error)
                    done = journal.open(resume=True)
        except BaseException as error:
            if ranks.main and isinstance(error, NumericalError):
                journal.discard()  # the same command would fail in the same layer again
            kept = ranks.main and journal.close()
            if kept and isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"finished layers are kept in {journal.folder}; go on with --resume") from None
            raise


def reduced_budget(p: PruneRequest, budget: int | None, ranks: Ranks, error: torch.OutOfMemoryError) -> int:
    """The next budget to try when the estimate was too low and the device ran out of memory.

    Raises:
        RankError: several processes would have to agree; the run is to be started again.
    """
    if ranks.world > 1:
        raise RankError(
            f"the device of process {ranks.rank} ran out of memory; start the same command with --resume and a smaller "
            "--memory"
        ) from error
    if p.device.type == "cuda":
        torch.cuda.empty_cache()
    before = budget if budget is not None else free_bytes(p.device)
    return int(0.75 * before)


def finished_before(p: PruneRequest, journal: Journal, digest: str) -> PruneReport | None:
    """The report of this very run if its output is whole: it was killed on its last steps, or is asked for again.

    Raises:
        OutputError: the output holds something else.
    """
    file = p.output / REPORT_FILE
    if not file.is_file():
        return None
    with suppress(ValueError, TypeError, KeyError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["request"] == digest:
            report = PruneReport.from_json(found)
            journal.discard()
            return report
    check_output(p.output, p.overwrite)
    return None


def _request(p: PruneRequest, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the result."""
    found = versions(p.device)
    return {
        "model": {"name": p.source.name, "files": fingerprint(source_files(p.source))},
        "settings": asdict(p.config),
        "plan": p.plan.to_json(),
        "calibration": described(p.windows, p.calibration),
        "dtype": str(p.stored).removeprefix("torch."),
        "forward_dtype": str(dtype).removeprefix("torch."),
        "versions": {name: found[name] for name in ("slimgpt", "torch", "transformers", "device")},
    }


@dataclass(frozen=True)
class _Calls:
    """Whom to tell of what is done."""

    on_layer: OnLayer | None = None
    on_start: OnStart | None = None
    on_measured: OnMeasured | None = None
    on_distilled: OnDistilled | None = None
    on_rehearsed: OnRehearsed | None = None


@dataclass(frozen=True)
class _FolderRun:
    """One process's part of a run from a model's name to a folder.

    Args:
        windows: this process's share of those that are repaired on.
        tokens: how many are trained on afterwards.
        dtype: of the forward passes where it is another than that of the weights.
        digest: of the request.
    """

    p: PruneRequest
    ranks: Ranks
    windows: Tensor
    tokens: int
    dtype: torch.dtype | None
    journal: Journal
    digest: str
    calls: _Calls

    def __call__(self, done: int, budget: int | None) -> PruneReport:
        """Prune, train, and write the folder.

        Args:
            done: how many layers an earlier run has finished.
            budget: bytes that may be used on the device; ``None``: what is free.
        """
        p, ranks, dtype = self.p, self.ranks, self.dtype
        start = time.perf_counter()
        layers = open_model(p)
        layers.check_finite(ranks)
        model = layers.model
        copied = dtype is not None or p.device.type != "cpu"
        need = memory_need(model, self.windows, p.plan, p.config, dtype, copied)
        placement = choose_placement(need, p.device, budget)
        if p.device.type == "cuda" and p.budget is not None:
            limit_gpu_memory(p.device, p.budget)
        if self.calls.on_start is not None and ranks.main:
            self.calls.on_start(placement, done)
        dense = tuple(layer_sizes(model.config))
        reports = []
        run = ExecutionContext(p.device, placement, dtype, ranks, self.journal.scratch)
        plan, allocation = p.plan, {}
        if uses_sensitivity(p.config, p.shape, p.windows):
            plan, allocation = self._allocated(layers, run)
        for finished in prune_layers(model, layers, self.windows, plan, p.config, run, self.journal):
            if ranks.main:
                self.journal.write(finished)
                reports.append(finished.report)
                if self.calls.on_layer:
                    self.calls.on_layer(finished.report, plan)
            del finished
        distillation = self._distilled(layers, plan, run) if ranks.main and self.tokens else {}
        earlier = sum(sum(report.seconds.values()) for report in reports[:done])
        report = PruneReport(
            base_model=p.source.name,
            model_type=model.config.model_type,
            settings=p.config,
            plan=plan,
            dense_sizes=dense,
            layers=tuple(reports),
            calibration=described(p.windows, p.calibration),
            versions=versions(p.device),
            seconds=earlier + time.perf_counter() - start,
            execution=execution(dtype or p.stored, placement, ranks.world),
            request=self.digest,
            allocation=allocation,
            distillation=distillation,
        )
        if ranks.main:
            assemble(self.journal, model, p.tokenizer, report, weights_folder(p.source))
        return report

    def _allocated(self, layers: LayerSource, run: ExecutionContext) -> tuple[Plan, dict[str, Any]]:
        """The plan by measured costs; rank 0 measures, or reads what an earlier run measured, and the others follow."""
        p = self.p
        names = list(p.plan.layers[0])
        widths = torch.empty(len(p.plan.layers), len(names), dtype=torch.long)
        allocation: dict[str, Any] = {}
        file = self.journal.folder / PLAN_FILE
        if self.ranks.main:
            if not file.is_file():
                plan, allocation = allocate(
                    p.plan, p.shape, layers.model, layers, p.windows, p.config, run, self.calls.on_measured
                )
                write_text(file, json.dumps({"layers": plan.layers, "allocation": allocation}))
            with reading(file):
                found = json.loads(file.read_text(encoding="utf-8"))
                allocation = found["allocation"]
                widths = torch.tensor([[layer[name] for name in names] for layer in found["layers"]])
        rows = self.ranks.broadcast(widths.to(p.device)).tolist()
        chosen = [dict(zip(names, row)) for row in rows]
        return plan_of_widths(p.shape, chosen, p.plan.head_unit, ratio=p.plan.ratio), allocation

    def _distilled(self, layers: LayerSource, plan: Plan, run: ExecutionContext) -> dict[str, Any]:
        """Train the finished layers of the journal, unless an earlier run has; what is said of it."""
        p, journal = self.p, self.journal
        said = journal.distillation_info()
        if said is not None:
            return said
        model, slim = layers.model, []
        for index, (shell, sizes) in enumerate(zip(decoder_layers(model), plan.layers, strict=True)):
            finished = journal(index)
            assert finished is not None
            slim.append(rebuild_layer(shell, model.config, index, finished.state, sizes))  # mapped, not read
        lesson = build_distillation_data(
            model, layers, p.windows, self.tokens, p.config, run, self.calls.on_rehearsed, journal.text
        )
        training = Distillation(model, slim.__getitem__, plan, lesson, run, journal.training())
        said = training(self.calls.on_distilled, journal.write_training)
        trained = ({**layer.state_dict(), **training.parameters(index)} for index, layer in enumerate(slim))
        journal.write_distilled(trained if said["kept"] else (), said)
        return said


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
    resume: bool = False,
    memory: str | None = None,
    on_layer: OnLayer | None = None,
    on_measured: OnMeasured | None = None,
    on_distilled: OnDistilled | None = None,
    on_rehearsed: OnRehearsed | None = None,
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
        settings: the other keywords of :func:`prune`.

    Raises:
        SlimGPTError: as :func:`prune`, and for a model or an output folder that is refused.
    """
    config = make_config(ratio=ratio, **settings)
    prepared = prepare(model, output, config, calibration, device, dtype, trust_remote_code, overwrite, resume, memory)
    return run_to_folder(
        prepared, on_layer, on_measured=on_measured, on_distilled=on_distilled, on_rehearsed=on_rehearsed
    )
