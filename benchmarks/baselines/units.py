"""What every baseline needs: the units of a model, and a model cut down to the units that it chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.capture import capture, run_layer
from slimgpt.layerwise.context import ExecutionContext, running_layer
from slimgpt.models.architecture import Structure
from slimgpt.models.build import architecture_of, rebuild_layer
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import count, describe
from slimgpt.models.slicing import output_matrix, slice_state, unit_rows
from slimgpt.models.stock_config import apply_sizes
from slimgpt.planning.plan import plan_of_widths
from slimgpt.pruning.in_place import prune_model
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import Placement

HEADS, CHANNELS = "heads", "channels"
Kept = list[dict[str, Tensor]]
"""For every layer the kept ``heads`` and ``channels``, sorted."""


def quiet(*_: Any) -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class Job:
    """What every method is given.

    Args:
        windows: ``(num_samples, seq_len)`` long, the calibration tokens; the same for every method.
        ratio: the share of the decoder's parameters to remove.
        repair: solve for the weights that stay; ``None`` leaves the method as published.
        seed: for what is drawn.
        batch_size: windows that go through a layer together.
        dtype: of the forward passes over the calibration tokens: ``float32`` or ``bfloat16``.
        device: where layers run; the model itself stays in host memory.
        arguments: of ``slimgpt.prune``, for the methods that it has.
        on_step: called with steps done and steps in all.
        info: what a method has to say of its run, to be kept with the row.
    """

    windows: Tensor
    ratio: float
    repair: bool | None = None
    seed: int = 0
    batch_size: int = 4
    dtype: str = "float32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    arguments: tuple[tuple[str, Any], ...] = ()
    on_step: Callable[[int, int], None] = quiet
    info: dict[str, Any] = field(default_factory=dict)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a model."""
    return cast(nn.ModuleList, model.get_submodule(architecture_of(model.config, model).layers))


def decoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of all decoder layers, counted on the model itself."""
    return sum(count(layer) for layer in decoder_layers(model))


def structures_of(model: PreTrainedModel, head_unit: str) -> dict[str, Structure]:
    """What is removed, in forward order."""
    architecture = architecture_of(model.config, model)
    return {structure.name: structure for structure in architecture.chosen(head_unit)}


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    job: Job,
    watch: Callable[[int, nn.Module], None] = quiet,
    moved: Callable[[int, Tensor, Tensor], None] = quiet,
) -> None:
    """Run the dense model over the calibration tokens layer by layer, in the job's type.

    Args:
        watch: called with a layer's index and the layer, a copy that may be given hooks, before it is run.
        moved: called with the index and the hidden states before and after it, ``(batch, seq_len, hidden_size)``.
    """
    layers, dtype = decoder_layers(model), getattr(torch, job.dtype)
    run = ExecutionContext(job.device, Placement(0, "device", "device"), dtype)
    stream = capture(model, layers, job.windows, job.batch_size, ActivationStore("device", job.device), dtype)
    for index, layer in enumerate(layers):
        running = running_layer(layer, model.config, index, run)
        watch(index, running)
        for number in range(len(stream)):
            before = stream.hidden.get(number)
            after = run_layer(running, before, stream.arguments[number][index])
            moved(index, before, after)
            stream.hidden.put(number, after)
        job.on_step(index + 1, len(layers))


def cut(model: PreTrainedModel, kept: Kept, head_unit: str, job: Job) -> None:
    """Remove all other units, in place; the weights that stay are repaired if the job asks for it, else left."""
    if job.repair:
        _cut_and_repair(model, kept, head_unit, job)
        return
    architecture, layers = architecture_of(model.config, model), decoder_layers(model)
    structures, sizes = structures_of(model, head_unit), layer_sizes(model.config)
    for index, layer in enumerate(layers):
        state, widths = layer.state_dict(), sizes[index]
        for name, structure in structures.items():
            W = output_matrix(state, structure)
            columns = unit_rows(W.shape[1], structure.units(widths), kept[index][name])
            state = slice_state(state, structure, widths, kept[index][name], W[:, columns].contiguous())
            widths = structure.shrink(widths, len(kept[index][name]))
        layers[index] = rebuild_layer(layer, model.config, index, state, widths)
        sizes[index] = widths
    apply_sizes(model, architecture, sizes)


def _cut_and_repair(model: PreTrainedModel, kept: Kept, head_unit: str, job: Job) -> None:
    """Our loop with the choice given."""
    structures, widths = structures_of(model, head_unit), []
    for sizes, units in zip(layer_sizes(model.config), kept, strict=True):
        for name, structure in structures.items():
            sizes = structure.shrink(sizes, len(units[name]))
        widths.append(sizes)
    plan = plan_of_widths(describe(model.config, model), widths, head_unit)
    config = PruneConfig(repair=True, seed=job.seed, batch_size=job.batch_size)
    dtype = None if job.dtype == "float32" else getattr(torch, job.dtype)
    run = ExecutionContext(job.device, Placement(0, "device", "device"), dtype)
    for report in prune_model(model, job.windows, plan, config, run, lambda index, name: kept[index][name]):
        job.on_step(report.layer + 1, len(widths))
