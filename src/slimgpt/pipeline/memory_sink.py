"""A model in memory as the source and the sink of a run, and its pruned layers beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from slimgpt.distillation.generate import GeneratedText
from slimgpt.distillation.trainer import Distillation
from slimgpt.models.build import decoder_layers, rebuild_layer
from slimgpt.models.slicing import State
from slimgpt.models.streaming import check_finite
from slimgpt.pipeline.stages import MeasuredPlan
from slimgpt.planning.plan import Plan
from slimgpt.pruning.in_place import LayerReplacement
from slimgpt.pruning.report import PrunedLayer, PruneReport
from slimgpt.runtime.distributed import Ranks


class ModelInMemory:
    """Both ends of a run on a loaded model: pruned layers take the dense ones' places."""

    replaces_source = True
    scratch = None
    readers = Ranks()

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.replacement = LayerReplacement(model)

    def __call__(self, index: int) -> nn.Module:
        return decoder_layers(self.model)[index]

    def check_finite(self, ranks: Ranks) -> None:
        check_finite(self.model.state_dict().items())

    def measured_plan(self, measure: Callable[[], MeasuredPlan]) -> MeasuredPlan:
        return measure()

    def generated_text(self, generate: Callable[[], GeneratedText]) -> GeneratedText:
        return generate()

    def finished_layer(self, index: int) -> PrunedLayer | None:
        return None

    def write(self, layer: PrunedLayer) -> None:
        self.replacement.write(layer)

    def close_layers(self) -> None:
        self.replacement.close()

    def finished_training(self) -> dict[str, Any] | None:
        return None

    def slim_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        return decoder_layers(self.model).__getitem__

    def training_state(self) -> State | None:
        return None

    def write_training_state(self, state: State) -> None:
        """Nothing is kept: a run in memory cannot be resumed."""

    def write_trained(self, training: Distillation, info: dict[str, Any]) -> None:
        if info["kept"]:
            training.apply(self.model)

    def final_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        return self.slim_layers(plan)

    def finish(self, report: PruneReport) -> None:
        """The model is finished as it is."""


class LayersInMemory(ModelInMemory):
    """Both ends of a run whose pruned layers are kept beside the loaded model, which stays as it is."""

    replaces_source = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.pruned: list[nn.Module] = []

    def write(self, layer: PrunedLayer) -> None:
        index = layer.report.layer
        dense = decoder_layers(self.model)[index]
        # Cloned: what is trained later may share its storage with the dense model.
        state = {name: tensor.clone() for name, tensor in layer.state.items()}
        self.pruned.append(rebuild_layer(dense, self.model.config, index, state, layer.report.sizes))

    def close_layers(self) -> None:
        """The model's config stays that of the dense one."""

    def slim_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        return self.pruned.__getitem__

    def write_trained(self, training: Distillation, info: dict[str, Any]) -> None:
        if info["kept"]:
            for index, layer in enumerate(self.pruned):
                for name, trained in training.parameters(index).items():
                    layer.get_parameter(name).data.copy_(trained)
