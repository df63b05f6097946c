"""The stages of every run, once: measure, generate, prune, distil, compare with the dense model, report.

A run takes dense layers from a :class:`LayerSource` and gives pruned ones to a :class:`LayerSink`: a model in memory,
or the journal of a run to a folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.calibration.evaluation_text import EvaluationText
from slimgpt.config import PruneConfig
from slimgpt.distillation.data import build_distillation_data
from slimgpt.distillation.generate import GeneratedText
from slimgpt.distillation.schedule import pruning_split
from slimgpt.distillation.trainer import Distillation
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.models.slicing import State
from slimgpt.pipeline.callbacks import Callbacks
from slimgpt.pipeline.dense_comparison import DenseComparison
from slimgpt.planning.plan import Plan
from slimgpt.pruning.loop import prune_layers
from slimgpt.pruning.memory_estimate import memory_need
from slimgpt.pruning.report import LayerReport, PrunedLayer, PruneReport, described, execution
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.memory import choose_placement
from slimgpt.runtime.versions import versions
from slimgpt.sensitivity.allocate import uses_sensitivity
from slimgpt.sensitivity.whole_experts import choose_widths, measures_experts

MeasuredPlan = tuple[Plan, dict[str, Any]]
"""A plan by measured costs, and what a report says of the measuring."""


class LayerSource(Protocol):
    """A dense model whose layers come one by one."""

    @property
    def model(self) -> PreTrainedModel:
        """Embeddings, final norm and LM head; its layers may have no storage."""
        ...

    def __call__(self, index: int) -> nn.Module:
        """The dense layer of an index."""
        ...

    def check_finite(self, ranks: Ranks) -> None:
        """Refuse NaN and infinity in the weights; every process looks at its share."""
        ...


class LayerSink(Protocol):
    """Destination of pruned layers, with the results of the run being resumed."""

    @property
    def replaces_source(self) -> bool:
        """Whether a pruned layer takes the dense one's place, so that the dense model is gone afterwards."""
        ...

    @property
    def scratch(self) -> Path | None:
        """The folder for activations that memory has no room for."""
        ...

    @property
    def readers(self) -> Ranks:
        """The processes that can read what the sink keeps: all, or the first alone. They train and compare."""
        ...

    def measured_plan(self, measure: Callable[[], MeasuredPlan]) -> MeasuredPlan:
        """The result of ``measure``, which all processes call, or of the run being resumed; the same in all."""
        ...

    def generated_text(self, generate: Callable[[], GeneratedText]) -> GeneratedText:
        """The result of ``generate``, which all readers call, or of the run being resumed; the same in all readers."""
        ...

    def finished_layer(self, index: int) -> PrunedLayer | None:
        """A layer that an earlier run has finished."""
        ...

    def write(self, layer: PrunedLayer) -> None:
        """Take a pruned layer."""
        ...

    def close_layers(self) -> None:
        """No more layers come, whether or not all have come."""
        ...

    def finished_training(self) -> dict[str, Any] | None:
        """The report's entry on the training, if the run being resumed has finished it."""
        ...

    def slim_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        """Gives the pruned layers, to be trained."""
        ...

    def training_state(self) -> State | None:
        """State of the training in the run being resumed."""
        ...

    def write_training_state(self, state: State) -> None:
        """Keep what the training has reached."""
        ...

    def write_trained(self, training: Distillation, info: dict[str, Any]) -> None:
        """Take the trained layers, if ``info["kept"]``, and what a report says of the training."""
        ...

    def final_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        """Gives the layers as they will be saved, trained or not."""
        ...

    def finish(self, report: PruneReport) -> None:
        """The run is over."""
        ...


@dataclass(frozen=True)
class PruneJob:
    """Input of the stages.

    Args:
        name: of the dense model, for the report.
        plan: the widths asked for; with measuring, what they remove is spent where it costs least.
        windows: all calibration tokens, ``(num_samples, seq_len)``.
        calibration: the name of where they come from.
        stored: the type of the weights.
        dtype: of the forward passes; ``None`` for that of the weights.
        copied: whether a layer's weights are copied to be run (another device or type), or used where they are.
        distill_tokens: on how many tokens the pruned model is trained; 0: not at all.
        evaluation: the texts that the result is compared with the dense model on; none if it is not.
        request: a digest of everything that decides the result, for a run that can be resumed.
        quantization: how the dense model's files were quantised, for the report; empty if they were not.
        calibration_info: what a report says of calibration text that the model wrote.
    """

    name: str
    config: PruneConfig
    shape: ModelShape
    plan: Plan
    windows: Tensor
    calibration: str
    device: torch.device
    stored: torch.dtype
    dtype: torch.dtype | None
    copied: bool
    distill_tokens: int
    evaluation: Mapping[str, EvaluationText] = field(default_factory=dict)
    request: str = ""
    quantization: dict[str, str] = field(default_factory=dict)
    calibration_info: dict[str, Any] = field(default_factory=dict)


def run_stages(
    job: PruneJob,
    source: LayerSource,
    sink: LayerSink,
    callbacks: Callbacks,
    ranks: Ranks,
    budget: int | None = None,
    finished: int = 0,
) -> PruneReport:
    """Measure, generate, prune, distil, compare with the dense model, report.

    The training's data need the dense model. Where pruning replaces it, they are made before; else after, when the
    loop's activations are gone.

    Args:
        ranks: the processes that take part; every one of them calls this.
        budget: bytes that may be used on the device; ``None``: what is free.
        finished: how many layers an earlier run has finished.

    Raises:
        NumericalError: NaN or infinity in weights or activations, or a Hessian that is not positive definite.
    """
    start = time.perf_counter()
    source.check_finite(ranks)
    model, config, plan = source.model, job.config, job.plan
    windows = ranks.share(pruning_split(job.windows, job.distill_tokens))
    need = memory_need(model, windows, plan, config, job.dtype, job.copied, processes=ranks.world)
    placement = choose_placement(need, job.device, budget)
    if callbacks.start is not None and ranks.main:
        callbacks.start(placement, finished)
    dense_sizes = tuple(layer_sizes(model.config))
    context = ExecutionContext(job.device, placement, job.dtype, ranks, sink.scratch)
    allocation: dict[str, Any] = {}
    if any(measures(config, job.shape, job.windows) for measures in (uses_sensitivity, measures_experts)):
        plan, allocation = sink.measured_plan(
            lambda: choose_widths(
                job.plan, job.shape, model, source, job.windows, config, context, on_measured=callbacks.measured
            )
        )
    readers = sink.readers
    shared = replace(context, ranks=readers)
    distil = _Distil(job, source, sink, callbacks, shared) if job.distill_tokens and readers.member else None
    if distil is not None and sink.replaces_source:
        distil.build_data()
    comparison = None
    if job.evaluation and readers.member:
        comparison = DenseComparison(model, job.evaluation, config.batch_size * windows.shape[1], shared)
    load_layer = source if comparison is None else comparison.along(source)
    reports: list[LayerReport] = []
    processor = time.process_time()
    try:
        for layer in prune_layers(model, load_layer, windows, plan, config, context, sink.finished_layer):
            if ranks.main:
                sink.write(layer)
                reports.append(layer.report)
                if callbacks.layer:
                    callbacks.layer(layer.report, plan)
            del layer
    finally:
        sink.close_layers()
    processor = time.process_time() - processor
    distillation = distil(plan) if distil is not None else {}
    readers.agree(0)  # the others wait until the first process has written all layers
    divergence = comparison(sink.final_layers(plan), plan, callbacks.compared) if comparison is not None else {}
    earlier = sum(sum(report.seconds.values()) for report in reports[:finished])
    report = PruneReport(
        base_model=job.name,
        model_type=model.config.model_type,
        settings=config,
        plan=plan,
        dense_sizes=dense_sizes,
        layers=tuple(reports),
        calibration={**described(job.windows, job.calibration), **job.calibration_info},
        versions=versions(job.device),
        seconds=earlier + time.perf_counter() - start,
        execution=execution(job.dtype or job.stored, placement, ranks.world, processor),
        request=job.request,
        allocation=allocation,
        distillation=distillation,
        divergence=divergence,
        quantization=job.quantization,
    )
    if ranks.main:
        sink.finish(report)
    return report


@dataclass
class _Distil:
    """The training after pruning, in all processes that can read the pruned layers."""

    job: PruneJob
    source: LayerSource
    sink: LayerSink
    callbacks: Callbacks
    context: ExecutionContext

    def build_data(self) -> None:
        """Generate the text that is missing, and run the dense model over all of it."""
        self.data = build_distillation_data(
            self.source.model,
            self.source,
            self.job.windows,
            self.job.distill_tokens,
            self.job.config,
            self.context,
            on_rehearsed=self.callbacks.prepare_step,
            load_or_generate=self.sink.generated_text,
        )

    def __call__(self, plan: Plan) -> dict[str, Any]:
        """Train the pruned layers, unless an earlier run has; what a report says of it."""
        ranks = self.context.ranks
        info = self.sink.finished_training() if ranks.main else None
        if ranks.agree(int(info is not None)):
            return info or {}
        layers = self.sink.slim_layers(plan)
        if not hasattr(self, "data"):
            self.build_data()
        state = self.sink.training_state() if ranks.main else None
        training = Distillation(self.source.model, layers, plan, self.data, self.context, state)
        info = training(self.callbacks.distilled, self.sink.write_training_state)
        if ranks.main:
            self.sink.write_trained(training, info)
        return info
