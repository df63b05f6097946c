"""The journal of a run to a folder as the sink of its layers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimgpt.checkpoint.assemble_folder import assemble
from slimgpt.checkpoint.journal import Journal
from slimgpt.checkpoint.kept_files import read_values, reading, write_values
from slimgpt.distillation.generate import GeneratedText
from slimgpt.distillation.trainer import Distillation
from slimgpt.models.build import decoder_layers, rebuild_layer
from slimgpt.models.slicing import State
from slimgpt.models.source import weights_folder
from slimgpt.pipeline.prepare import PruneRequest
from slimgpt.pipeline.stages import MeasuredPlan
from slimgpt.planning.plan import Plan, plan_of_widths
from slimgpt.pruning.report import PrunedLayer, PruneReport
from slimgpt.runtime.distributed import Ranks

PLAN_FILE = "plan.json"
"""In the journal's folder: the widths that were chosen by measurement."""


@dataclass
class JournalSink:
    """Keeps every result of a run on disk, so that a killed run goes on, and puts the folder together at its end.

    Args:
        model: what is around the layers.
        ranks: the processes of the run.
        readers: those that see the journal's folder: all, or the first alone.
    """

    request: PruneRequest
    journal: Journal
    model: PreTrainedModel
    ranks: Ranks
    readers: Ranks
    trained_layers: list[nn.Module] = field(default_factory=list)
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "layer-writer"))
    writing: Future[None] | None = None

    replaces_source = False

    @property
    def scratch(self) -> Path:
        return self.journal.scratch

    def measured_plan(self, measure: Callable[[], MeasuredPlan]) -> MeasuredPlan:
        """All measure, unless rank 0 reads what an earlier run measured; the others follow it."""
        schedule = self.request.plan
        names = [list(layer) for layer in schedule.layers]  # layers of experts have more than dense ones among them
        longest = max(map(len, names))
        widths = torch.empty(len(schedule.layers), longest, dtype=torch.long)
        allocation, round_to = {}, schedule.round_to
        file = self.journal.folder / PLAN_FILE
        if not self.ranks.agree(int(file.is_file())):
            plan, allocation = measure()
            if self.ranks.main:
                values = {"layers": plan.layers, "round_to": plan.round_to, "allocation": allocation}
                write_values(file, values)
        if self.ranks.main:
            values = read_values(file)
            with reading(file):
                allocation, round_to = values["allocation"], int(values["round_to"])
                rows = [[layer[name] for name in own] for own, layer in zip(names, values["layers"], strict=True)]
                widths = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        rows = self.ranks.broadcast(widths.to(self.request.device)).tolist()
        layers = [dict(zip(own, row)) for own, row in zip(names, rows)]
        plan = plan_of_widths(
            self.request.shape,
            layers,
            schedule.head_unit,
            ratio=schedule.ratio,
            round_to=self.ranks.agree(round_to),
        )
        return plan, allocation

    def generated_text(self, generate: Callable[[], GeneratedText]) -> GeneratedText:
        if not self.readers.agree(int(self.journal.generated() is not None)):
            text = generate()
            if self.readers.main:
                self.journal.write_generated(text)
            del text
        self.readers.agree(0)  # it is there now
        text = self.journal.generated()
        assert text is not None
        return text

    def finished_layer(self, index: int) -> PrunedLayer | None:
        return self.journal(index)

    def write(self, layer: PrunedLayer) -> None:
        """Let a thread write the layer, once the one before it is on disk.

        Raises:
            OutputError: the layer before could not be written.
        """
        self.close_layers()
        self.writing = self.writer.submit(self.journal.write, layer)

    def close_layers(self) -> None:
        """Wait until every layer is on disk.

        Raises:
            OutputError: the last one could not be written.
        """
        writing = self.writing
        if writing is None:
            return
        try:
            writing.result()
        finally:
            if writing.done():  # else an interrupt came: the journal is not to be closed while a layer is written
                self.writing = None

    def finished_training(self) -> dict[str, Any] | None:
        return self.journal.distillation_info()

    def slim_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        for index, (empty, sizes) in enumerate(zip(decoder_layers(self.model), plan.layers, strict=True)):
            layer = self.journal(index)
            assert layer is not None
            # The weights are mapped, not read.
            self.trained_layers.append(rebuild_layer(empty, self.model.config, index, layer.state, sizes))
        return self.trained_layers.__getitem__

    def training_state(self) -> State | None:
        return self.journal.training()

    def write_training_state(self, state: State) -> None:
        self.journal.write_training(state)

    def write_trained(self, training: Distillation, info: dict[str, Any]) -> None:
        states = (
            {**layer.state_dict(), **training.parameters(index)} for index, layer in enumerate(self.trained_layers)
        )
        self.journal.write_distilled(states if info["kept"] else (), info)

    def final_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        layers = decoder_layers(self.model)

        def final_layer(index: int) -> nn.Module:
            state = self.journal.final_state(index)  # the weights are mapped, not read
            return rebuild_layer(layers[index], self.model.config, index, state, plan.layers[index])

        return final_layer

    def finish(self, report: PruneReport) -> None:
        folder = weights_folder(self.request.source)
        assemble(self.journal, self.model, self.request.tokenizer, report, folder)
