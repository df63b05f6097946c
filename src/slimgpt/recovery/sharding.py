"""A model divided among processes by FSDP2, so that weights, gradients and Adam's moments of one fit no GPU alone.

Hugging Face's Trainer divides by accelerate's plugin, which knows no CPUs. So torch's ``fully_shard`` is called here,
and accelerate leaves the model as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from slimgpt.models.build import architecture_of
from slimgpt.runtime.distributed import Ranks, collective_errors
from slimgpt.runtime.memory import return_large_blocks


def shard(
    model: nn.Module,
    base: PreTrainedModel,
    device: torch.device,
    ranks: Ranks,
    dtype: torch.dtype | None = None,
) -> None:
    """Divide every parameter by its rows among all processes, in place; every process has to call it.

    Decoder layers are gathered one at a time; what is outside of them (embeddings, the last norm, the output head) is
    one group more. Of weights that are mapped from files a process reads its own rows alone.

    Args:
        model: on the CPU, in every process with the same values; ``base``, or adapters on it.
        base: the model whose layers are looked up.
        device: where this process computes.
        dtype: of the parameters afterwards; ``None`` leaves it as it is.
    """
    layers = base.get_submodule(architecture_of(base.config, base).layers)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        return_large_blocks()
    with collective_errors():
        mesh = init_device_mesh(device.type, (ranks.world,))
        for layer in layers.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if dtype is not None:  # once it is divided: whole, it would be there twice
        model._apply(lambda tensor: tensor.to(dtype) if isinstance(tensor, DTensor) else tensor)
    for buffer in model.buffers():  # those are not divided
        buffer.data = buffer.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are divided among processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the rows of all processes; where it is divided, every process has to call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    with collective_errors():
        return tensor.full_tensor()


def sharded_like(reference: Tensor, tensor: Tensor) -> Tensor:
    """This process's rows of ``tensor`` if ``reference`` is divided, without a message; else ``tensor``."""
    if not isinstance(reference, DTensor) or tensor.dim() == 0:
        return tensor
    mesh = reference.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, reference.placements, src_data_rank=None)


def max_over_ranks(ranks: Ranks, count: int) -> int:
    """The largest of the numbers that the processes give."""
    counts = [0.0] * ranks.world
    counts[ranks.rank] = float(count)
    return int(max(ranks.sums(counts)))
