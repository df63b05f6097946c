"""The loop: layer by layer, attention before FFN, each on the stream of the layers already pruned.

Every matrix is multiplied once per token. Attention runs once and the inputs of its output matrix are kept; the
pruned matrix turns them into the attention's result. The gate and up matrices run once on that, and their output
meets the pruned down matrix. So a layer costs less than one dense forward pass, plus two Gram matrices and the
solver.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.models.architectures import Sizes, Structure
from slimgpt.models.heterogeneous import architecture_of, layer_sizes, rebuild_layer, with_sizes
from slimgpt.models.shape import count
from slimgpt.models.slicing import State, slice_state, unit_rows
from slimgpt.models.stock import apply_sizes
from slimgpt.planning.plan import Plan
from slimgpt.pruning.capture import Arguments, Part, capture, run_with
from slimgpt.pruning.report import LayerReport
from slimgpt.solver import CRITERIA, Criterion, Gram, damp, reconstruct, relative_error

EXACT_SIZE = 4096
"""Up to this many columns the solver runs in fp64: it costs little there, and fp32 loses digits to damping 0."""


def prune_layers(
    model: PreTrainedModel, windows: Tensor, plan: Plan, config: PruneConfig, device: torch.device
) -> Iterator[LayerReport]:
    """Prune a model in place, one layer per step.

    Layers are moved to ``device`` one at a time and back to where they were. The model is whole after every
    step: if the iteration ends early, the layers that are done stay narrow and the config says so.

    Args:
        windows: ``(num_samples, seq_len)`` long, the calibration tokens.
        plan: the widths to reach.
        device: where layers run and are solved.

    Raises:
        NumericalError: NaN or infinity in weights or activations, or a Hessian that is not positive definite.
    """
    architecture = architecture_of(model.config, model)
    criterion = CRITERIA[config.method]
    repair = criterion.repair if config.repair is None else config.repair
    generator = torch.Generator().manual_seed(config.seed)
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    sizes = layer_sizes(model.config)
    configs = list(model.config.per_layer_config)
    check_finite(model)
    stream = capture(model, layers, windows, config.batch_size, device)
    try:
        for index, target in enumerate(plan.layers):
            home = next(layers[index].parameters()).device
            layer = layers[index].to(device)
            arguments = [per_layer[index] for per_layer in stream.arguments]
            solve = _Solver(criterion, repair, config.damping, generator, index)
            structures = {"heads": architecture.heads(plan.head_unit), "channels": architecture.ffn}
            state, stream.hidden = _prune_layer(
                layer, structures, sizes[index], target, stream.hidden, arguments, solve
            )
            before = count(layer)
            layers[index] = rebuild_layer(layer, with_sizes(configs[index], target), index, state).to(home)
            sizes[index] = dict(target)
            yield LayerReport(index, sizes[index], solve.kept, solve.error, before, count(layers[index]), solve.seconds)
    finally:
        apply_sizes(model, architecture, sizes)


@dataclass
class _Solver:
    """Chooses and repairs for one layer; notes what it kept, the errors and the seconds."""

    criterion: Criterion
    repair: bool
    damping: float
    generator: torch.Generator
    layer: int
    kept: dict[str, list[int]] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "hessian": 0.0, "solver": 0.0})

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the seconds of a block to a part, with the device's work finished."""
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[part] += time.perf_counter() - start

    def solve(
        self, name: str, structure: Structure, W: Tensor, gram: Gram, sizes: Sizes, target: Sizes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The kept units, the columns they own, and the repaired matrix ``(out, columns)``."""
        units, keep = structure.units(sizes), structure.units(target)
        where = f"layer {self.layer}, {structure.output}"
        if not torch.isfinite(gram.sum).all():
            raise NumericalError(f"{where}: its inputs hold NaN or infinity on the calibration text")
        dtype = torch.float64 if W.shape[1] <= EXACT_SIZE and W.device.type != "mps" else torch.float32
        exact, H = W.to(dtype), gram.mean().to(dtype)
        damped = damp(H, self.damping)
        try:
            if name == "heads":
                groups = structure.group_count(sizes)
                kept = self.criterion.heads(exact, damped, units, keep, groups, self.generator)
            else:
                kept = self.criterion.channels(exact, damped, keep, self.generator)
            columns = unit_rows(W.shape[1], units, kept).to(W.device)
            W_kept = reconstruct(exact @ damped, damped, columns) if self.repair else exact[:, columns]
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(
                f"{where}: the Hessian is not positive definite with damping {self.damping:g}; "
                "raise --damping (0.01 is usual) or give more calibration tokens"
            ) from error
        self.kept[name], self.error[name] = kept.tolist(), relative_error(exact, W_kept, H, columns)
        return kept, columns, W_kept.to(W.dtype)


@torch.no_grad()
def _prune_layer(
    layer: nn.Module,
    structures: dict[str, Structure],
    sizes: Sizes,
    target: Sizes,
    hidden: list[Tensor],
    arguments: list[Arguments],
    solver: _Solver,
) -> tuple[State, list[Tensor]]:
    """The state dict of the narrower layer, and the hidden states after it."""
    device = hidden[0].device
    state: State = layer.state_dict()
    results: list[dict[str, Any]] = [{} for _ in hidden]  # per batch: what each finished container returns
    for name, structure in structures.items():
        linear = layer.get_submodule(structure.output)
        W, bias = cast(Tensor, linear.weight).detach(), cast(Tensor | None, linear.bias)
        units = structure.units(sizes)
        gram = Gram(W.shape[1], device) if structure.units(target) < units else None
        columns = None
        parts: list[Part | None] = []
        for batch, done, kwargs in zip(hidden, results, arguments):
            with solver.timed("forward", device):
                part = run_with(layer, done, batch, kwargs, until=structure.output)
            parts.append(part)
            if gram is not None:
                with solver.timed("hessian", device):
                    gram.add(part.inputs)
        if gram is None:
            solver.kept[name], solver.error[name] = list(range(units)), 0.0
        else:
            with solver.timed("solver", device):
                kept, columns, W = solver.solve(name, structure, W, gram, sizes, target)
                state = slice_state(state, structure, sizes, kept, W)
                sizes = structure.shrink(sizes, len(kept))
        with solver.timed("forward", device):
            for number, done in enumerate(results):
                part, parts[number] = cast(Part, parts[number]), None  # lets the kept inputs go one by one
                inputs = part.inputs if columns is None else part.inputs[..., columns]
                done[structure.container] = part.rebuild(F.linear(inputs, W, bias))
    with solver.timed("forward", device):
        outputs = [run_with(layer, done, batch, kwargs) for done, batch, kwargs in zip(results, hidden, arguments)]
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise NumericalError(f"layer {solver.layer}: its output holds NaN or infinity on the calibration text")
    return state, outputs


def check_finite(model: nn.Module) -> None:
    """Look for NaN and infinity in the weights.

    Raises:
        NumericalError: with the name of the first tensor that has one.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"the weights hold NaN or infinity in {name}; the file is damaged or training diverged"
            )
