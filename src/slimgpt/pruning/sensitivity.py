"""What it costs to narrow each structure alone: the divergence of the model's predictions from the dense model's.

One pass through the layers measures all of them. The dense stream of some windows gives every structure's Hessian;
every structure is solved at a few widths; and for each of these a variant of the stream of a few *other* windows
leaves the layer, narrowed in that one place, and goes through the rest of the dense model with the variants of the
layers before. A few more streams are narrowed in every layer, which shows what costs beyond the sum. Layers are
visited once, in order, so a model that does not fit into memory can be measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.models.architectures import Sizes, Structure
from slimgpt.models.heterogeneous import architecture_of, layer_sizes
from slimgpt.models.shape import ModelShape
from slimgpt.models.slicing import unit_rows
from slimgpt.planning.budget import Curve, Sensitivity, spend
from slimgpt.planning.plan import Plan
from slimgpt.pruning.capture import Part, StandIn, Stream, capture, run_layer, run_with
from slimgpt.pruning.memory import DEVICE, FILE, HOST, Shelf, trim, used_bytes
from slimgpt.pruning.sequential import Run, gram_for, matrix_of, running_layer
from slimgpt.solver import CRITERIA, Gram, damp, group_sizes, reconstruct, select_channels

SHARES = (0.25, 0.5, 0.75)
"""Shares of a structure's units at which its cost is measured."""

PROBE_TOKENS, PROBE_LENGTH = 1024, 512
"""Tokens whose predictions are compared, and the longest window of them."""

FIT_TOKENS, FIT_PER_COLUMN = 16384, 4
"""The Hessians see so many tokens, or so many per column of the widest matrix where that is more."""

JOINT = -1
"""In place of a layer's index: narrowed in all layers at once."""

OnMeasured = Callable[[int, int, float], None]
"""Called after every layer with its index, the number of layers and the seconds it took."""


@dataclass
class _Variant:
    """A stream that was narrowed in one place."""

    layer: int
    unit: str
    share: float


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    take: Callable[[int], nn.Module],
    windows: Tensor,
    head_unit: str,
    config: PruneConfig,
    run: Run,
    on_measured: OnMeasured | None = None,
) -> Sensitivity:
    """The cost of every structure of every layer by the share of its units that is removed.

    The cost is the mean over tokens of ``KL(dense || narrowed)`` in nats.

    Args:
        model: what is around the layers.
        take: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)`` long; the last ones are the ones whose predictions are compared.
        head_unit: ``kv`` or ``query``.

    Raises:
        NumericalError: a Hessian that is not positive definite.
    """
    architecture = architecture_of(model.config, model)
    layers = model.get_submodule(architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    sizes = layer_sizes(model.config)
    fit, probe = divide(windows, max(max(layer.values()) for layer in sizes))
    stream = capture(
        model, layers, fit, config.batch_size, Shelf(run.placement.stream, run.device, run.scratch), run.dtype
    )
    held = capture(model, layers, probe, len(probe), Shelf("device", run.device), run.dtype)
    dense = held.hidden.take(0)
    # How far rounding alone moves the predictions: the dense stream, disturbed by half a unit in the last place.
    noise = torch.rand(dense.shape, generator=torch.Generator().manual_seed(config.seed)).to(dense)
    disturbed = dense * (1 + torch.finfo(dense.dtype).eps * (noise - 0.5))
    variants = [_Variant(0, "rounding", 0.0)]
    most = len(layers) * len(SHARES) * len(architecture.chosen(head_unit)) * dense.numel() * dense.element_size()
    shelf = Shelf(_place(most, run), run.device, run.scratch)
    shelf.put(0, disturbed)
    tuples = False
    joint: dict[tuple[str, float], Tensor] = {}
    for index in range(len(layers)):
        start = time.perf_counter()
        layer = running_layer(take(index), model.config, index, run)
        arguments = held.arguments[0][index]
        tuples = isinstance(layer(shelf.get(0), **arguments), tuple) if index == 0 else tuples
        for number in range(len(variants)):
            shelf.put(number, run_layer(layer, shelf.get(number), arguments))
        state = layer.state_dict()
        structures = [s for s in architecture.chosen(head_unit) if s.key in state]
        grams = _advance(layer, index, structures, stream, run)
        given: dict[str, Any] = {}
        before, passed = dense, set()
        for structure, gram in zip(structures, grams):
            part = run_with(layer, given, dense, arguments, until=structure.output)
            W, bias = matrix_of(layer, structure)
            for share, columns, W_kept in _narrowed(W, gram, structure, sizes[index], config, index):
                result = part.rebuild(F.linear(part.inputs[..., columns], W_kept, bias))
                shelf.put(len(variants), run_with(layer, {**given, part.place: result}, dense, arguments))
                variants.append(_Variant(index, structure.unit, share))
                key = (structure.unit, share)
                hidden = joint.get(key, before)
                joint[key] = _run_narrowed(layer, structure, columns, W_kept, bias, hidden, arguments)
                passed.add(key)
            given[part.place] = part.rebuild(F.linear(part.inputs, W, bias))
        for key in joint.keys() - passed:  # a layer that has nothing of the kind, or too few units
            joint[key] = run_layer(layer, joint[key], arguments)
        dense = run_with(layer, given, dense, arguments)
        del layer, grams
        trim()
        if on_measured:
            on_measured(index, len(layers), time.perf_counter() - start)
    for (unit, share), hidden in joint.items():
        shelf.put(len(variants), hidden)
        variants.append(_Variant(JOINT, unit, share))
    costs = _divergences(model, layers, probe, dense, shelf, len(variants), tuples)
    return _sensitivity(variants, costs, len(layers))


def divide(windows: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    """The windows that give the Hessians, and the (shorter) ones whose predictions are compared: never the same."""
    length = min(windows.shape[1], PROBE_LENGTH)
    count = min(max(PROBE_TOKENS // length, 1), max(len(windows) // 2, 1))
    tokens = max(FIT_TOKENS, FIT_PER_COLUMN * widest)
    most = -(-tokens // windows.shape[1])
    rest = windows[:-count] if len(windows) > count else windows
    return rest[:most], windows[-count:, :length]


def _place(size: int, run: Run) -> str:
    """Where the variants are kept: where the stream is, or farther off if they take more than a quarter of the room."""
    room = run.placement.budget - used_bytes(run.device)
    if run.placement.stream != DEVICE or size <= room // 4:
        return run.placement.stream
    return FILE if run.device.type == "cpu" else HOST


def _advance(layer: nn.Module, index: int, structures: Sequence[Structure], stream: Stream, run: Run) -> list[Gram]:
    """The Gram matrix of every structure's inputs; the dense stream is moved on behind the layer."""
    grams: list[Gram] = []
    for number in range(len(stream)):
        hidden, arguments = stream.hidden.get(number), stream.arguments[number][index]
        given: dict[str, Any] = {}
        for place, structure in enumerate(structures):
            part: Part = run_with(layer, given, hidden, arguments, until=structure.output)
            W, bias = matrix_of(layer, structure)
            if number == 0:
                grams.append(gram_for(W.shape[1], run, f"gram-{structure.unit}"))
            grams[place].add(part.inputs)
            given[part.place] = part.rebuild(F.linear(part.inputs, W, bias))
        after = run_with(layer, given, hidden, arguments)
        if not bool(torch.isfinite(after).all()):
            raise NumericalError(f"layer {index}: its output holds NaN or infinity on the calibration text")
        stream.hidden.put(number, after)
    return grams


def _run_narrowed(
    layer: nn.Module,
    structure: Structure,
    columns: Tensor,
    W_kept: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    arguments: dict[str, Any],
) -> Tensor:
    """The hidden states after a layer of which one structure is narrowed."""
    part = run_with(layer, {}, hidden, arguments, until=structure.output)
    result = part.rebuild(F.linear(part.inputs[..., columns], W_kept, bias))
    return run_with(layer, {part.place: result}, hidden, arguments)


def _narrowed(
    W: Tensor, gram: Gram, structure: Structure, sizes: Sizes, config: PruneConfig, index: int
) -> list[tuple[float, Tensor, Tensor]]:
    """For every share: the share there is, the columns that stay and the repaired matrix ``(out, columns)``."""
    units, groups = structure.units(sizes), structure.group_count(sizes)
    per_group = units // groups
    removals = sorted({min(max(round(share * per_group), 1), per_group - 1) for share in SHARES} - {0})
    n, dtype = W.shape[1], gram.sum.dtype
    H = damp(gram.mean(), config.damping)
    exact = W.to(dtype)
    G = exact @ H
    found = []
    try:
        for removed in removals:
            keep = (per_group - removed) * groups
            if structure.name == "heads":
                criterion, generator = CRITERIA[config.method], torch.Generator().manual_seed(config.seed)
                kept = criterion.heads(exact, H, units, keep, groups, generator)
            else:  # an estimate: fewer, larger groups
                going = n - keep
                kept = select_channels(exact, H, keep, group_sizes(going, smallest=max(going // 16, 1)))
            columns = unit_rows(n, units, kept).to(W.device)
            found.append((removed / per_group, columns, reconstruct(G, H, columns).to(W.dtype)))
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise NumericalError(
            f"layer {index}, {structure.output}: the Hessian is not positive definite with damping "
            f"{config.damping:g}; raise --damping (0.01 is usual) or give more calibration tokens"
        ) from error
    return found


def _divergences(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    probe: Tensor,
    dense: Tensor,
    shelf: Shelf,
    count: int,
    tuples: bool,
) -> list[float]:
    """``KL(dense || variant)`` at every second position, in nats per token, for every variant.

    The first position is left out: nothing is known there, yet what holds attention sinks up shows in it.
    The model's own code computes the predictions from the streams, its layers being stood in for.

    Args:
        tuples: whether the layers return tuples.
    """
    originals = list(layers)
    embedding = next(model.get_input_embeddings().parameters())
    stream = dense

    def predictions(window: int) -> Tensor:
        nonlocal stream
        stream = dense if variant is None else shelf.get(variant)
        stream = stream[window : window + 1, 1::2].to(embedding)
        return model(input_ids=probe[window : window + 1, 1::2].to(embedding.device), use_cache=False).logits.float()

    costs = [0.0] * count
    try:
        for index, layer in enumerate(originals):
            layers[index] = StandIn(layer, lambda *_, **__: (stream,) if tuples else stream)
        for window in range(len(probe)):
            variant = None
            log_p = predictions(window).log_softmax(-1)
            p = log_p.exp()
            for variant in range(count):
                log_q = predictions(window).log_softmax(-1)
                costs[variant] += float((p * (log_p - log_q)).sum(-1).mean()) / len(probe)
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer
    return costs


def _sensitivity(variants: Sequence[_Variant], costs: Sequence[float], count: int) -> Sensitivity:
    """Costs by structure, less what rounding alone does in the layers behind it."""
    floor = costs[0]
    points: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for variant, cost in sorted(zip(variants[1:], costs[1:]), key=lambda pair: pair[0].share):
        rounding = floor * (count - max(variant.layer, 0)) / count
        points.setdefault((variant.layer, variant.unit), []).append((variant.share, max(cost - rounding, 0.0)))
    curves = [
        Curve(layer, unit, tuple(share for share, _ in found), tuple(cost for _, cost in found))
        for (layer, unit), found in sorted(points.items())
    ]
    return Sensitivity(
        tuple(curve for curve in curves if curve.layer >= 0),
        {curve.unit: curve for curve in curves if curve.layer == JOINT},
    )


def allocate(
    plan: Plan,
    shape: ModelShape,
    model: PreTrainedModel,
    take: Callable[[int], nn.Module],
    windows: Tensor,
    config: PruneConfig,
    run: Run,
    on_measured: OnMeasured | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """A plan that removes as much as ``plan`` does, where it costs least by measurement, and what a report says of it.

    Raises:
        NumericalError: see :func:`measure`.
    """
    start = time.perf_counter()
    costs = measure(model, take, windows, plan.head_unit, config, run, on_measured)
    better = spend(plan, shape, costs, config.round_to, heads=config.kv_cache is None)
    seconds = time.perf_counter() - start
    return better, {"by": "sensitivity", "seconds": seconds, **costs.to_json()}


def measurable(shape: ModelShape) -> bool:
    """Whether all that can be removed are heads and channels; experts go by the schedule."""
    return all(layer.experts is None for layer in shape.layers)
