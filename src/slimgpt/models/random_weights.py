"""Models of any widths in their real class with random weights: what is timed where no result depends on values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.models.architecture import Sizes
from slimgpt.models.build import architecture_of, empty_layer, empty_model, rebuild_layer
from slimgpt.models.streaming import fill_buffers


class RandomModel:
    """A model whose embeddings, head and norms are there, and whose layers are made as they are asked for.

    Layers of other widths share every tensor that has the same shape in both.

    Args:
        config: the dense model's.
        count: how many of its first layers the model has.
        device: where all is.
        dtype: of the weights.
    """

    def __init__(self, config: PreTrainedConfig, count: int, device: torch.device, dtype: torch.dtype):
        self.model: Any = empty_model(config)
        self.device, self.dtype = device, dtype
        self.path = architecture_of(config, self.model).layers
        self.empty = list(self.model.get_submodule(self.path).children())[:count]
        self.tensors: dict[tuple[int, str, torch.Size], Tensor] = {}
        self.noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
        self.set_layers([])
        state = {name: self._random(tensor) for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(state, strict=False, assign=True)
        self.model.tie_weights()
        fill_buffers(self.model)
        self.model.to(device).eval().requires_grad_(False)

    def layer(self, index: int, sizes: Sizes) -> nn.Module:
        """A layer of these widths."""
        empty, config = self.empty[index], self.model.config
        state = {}
        for name, tensor in empty_layer(empty, config, index, sizes).state_dict().items():
            key = (index, name, tensor.shape)
            if key not in self.tensors:
                self.tensors[key] = self._random(tensor).to(self.device)
            state[name] = self.tensors[key]
        layer = rebuild_layer(empty, config, index, state, sizes)
        for module, name, buffer in list(_meta_buffers(layer)):
            setattr(module, name, torch.zeros_like(buffer, device=self.device))
        return layer.to(self.device).eval().requires_grad_(False)

    def layers(self, sizes: Sequence[Sizes]) -> list[nn.Module]:
        """The first layers with these widths."""
        return [self.layer(index, each) for index, each in enumerate(sizes)]

    def set_layers(self, layers: Sequence[nn.Module]) -> None:
        """Let the model have these layers."""
        self.model.set_submodule(self.path, nn.ModuleList(layers))

    def _random(self, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros(like.shape, dtype=like.dtype)
        repeats = -(-like.numel() // self.noise.numel())
        return self.noise.to(self.dtype).repeat(max(repeats, 1))[: like.numel()].view(like.shape).clone()


def random_model(
    config: PreTrainedConfig, sizes: Sequence[Sizes], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A whole model of these widths in the class of its config, with random weights."""
    made = RandomModel(config, len(sizes), device, dtype)
    made.set_layers(made.layers(sizes))
    return made.model


def _meta_buffers(layer: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in layer.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                yield module, name, buffer
