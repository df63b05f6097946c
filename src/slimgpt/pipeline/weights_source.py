"""The dense model's layers, one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from slimgpt.models.build import decoder_layers
from slimgpt.models.loading import load_model
from slimgpt.models.mapped import streamed_model
from slimgpt.models.streaming import StreamedModel, check_finite
from slimgpt.pipeline.prepare import PruneRequest
from slimgpt.runtime.distributed import Ranks


@dataclass
class DenseLayers:
    """A dense model whose layers are taken one by one."""

    model: PreTrainedModel
    streamed: StreamedModel | None

    def __call__(self, index: int) -> nn.Module:
        if self.streamed is not None:
            return self.streamed.layer(index)
        return decoder_layers(self.model)[index]

    def check_finite(self, ranks: Ranks) -> None:
        if self.streamed is not None:
            self.streamed.check_finite(ranks.rank, ranks.world)
        else:
            check_finite(self.model.state_dict().items())


def open_model(request: PruneRequest) -> DenseLayers:
    """The model mapped from its files, or, where these need converting on the way in, loaded whole."""
    streamed = streamed_model(request.source, request.model_config, request.stored)
    if streamed is not None:
        streamed.read_ahead(request.device)
        return DenseLayers(streamed.model, streamed)
    return DenseLayers(
        load_model(request.source, request.model_config, request.dtype, "cpu", request.trust_remote_code), None
    )
