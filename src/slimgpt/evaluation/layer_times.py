"""Times of a layer's attention and FFN by their widths, from whole models of the real class timed in turn.

All layers of one kind get the same width, and what that saves is divided by their number: so a time has everything in
it that a layer costs where it is, such as weights that come from memory and not from a cache. No weight is read.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.errors import PlanError
from slimgpt.evaluation.speed import check_generation
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes
from slimgpt.models.lookup import text_config
from slimgpt.models.parameter_counts import ModelShape, attention_kept
from slimgpt.models.random_weights import RandomModel
from slimgpt.planning.plan import head_units
from slimgpt.planning.speed_table import LayerTimes, SpeedTable, table_model
from slimgpt.runtime.devices import synchronized_time
from slimgpt.runtime.versions import timed_machine, versions

MODEL_BYTES = 256 << 20
"""So many bytes the layers of the timed model have at least, if the model has them: more than a processor's cache."""

ROUNDS = 5
"""Timed rounds over all widths, after one that is not counted."""

DECODED = 16
"""New tokens that are timed, in the middle of those asked for."""

BETWEEN_DENSE = 3
"""So many widths are timed between two timings of the dense model, which theirs are compared with."""

CHANNEL_SHARES = (7 / 8, 3 / 4, 5 / 8, 1 / 2, 3 / 8, 1 / 4)
HEAD_SHARES = (3 / 4, 1 / 2, 1 / 4, 0)
"""Shares of channels and of heads that are timed; at least one head stays."""

OnTimed = Callable[[int, int, float], None]
"""Called after every timing with its number, the number of all and the seconds it took."""


class Seconds(NamedTuple):
    """Seconds of a prompt, and of each token after it."""

    prompt: float
    token: float

    def of(self, factor: Seconds) -> Seconds:
        """Both times by a factor of their own."""
        return Seconds(self.prompt * factor.prompt, self.token * factor.token)


@dataclass
class _Variant:
    """Layers to be timed, and how many of them differ from the dense model's."""

    layers: list[nn.Module]
    changed: int


class _PassThrough(nn.Module):
    """Stands where a layer is to cost nothing.

    Args:
        length: of the tuple that the family's layers return; 0 where they return hidden states alone.
    """

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states, *[None] * (self.length - 1)) if self.length else hidden_states


def measure_table(
    model_config: PreTrainedConfig,
    shape: ModelShape,
    head_unit: str,
    step: int,
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int = ROUNDS,
    on_timed: OnTimed | None = None,
) -> SpeedTable:
    """Time a model's layers on this machine, in transformers.

    Args:
        model_config: the dense model's config.
        shape: of all that can be removed; of an FFN or of heads that stay one width is timed.
        head_unit: ``kv`` or ``query``.
        step: that FFN widths will be multiples of; the widths that are timed are odd multiples, the least aligned of
            those that may be chosen.
        dtype: of the weights.
        rounds: timed rounds over all widths, after one that is not counted.

    Raises:
        UsageError: more tokens than the model's context.
        PlanError: the model gives no cache back that new tokens could be timed with.
    """
    check_generation(model_config, prompt, new_tokens, rounds, batch)
    kinds = layer_kinds(model_config, shape)
    widest = {index: _widest(shape, layers) for layers in kinds for index in layers}
    count = _timed_layers(shape, kinds, dtype.itemsize)
    made = RandomModel(model_config, count, device, dtype)
    dense = made.layers([widest[index] for index in range(count)])
    made.set_layers(dense)
    ids = torch.randint(
        text_config(model_config).vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)
    )
    length = _tuple_length(made.model, dense[0], ids[:, :2].to(device))
    variants: dict[tuple[Any, ...], _Variant] = {("rest",): _Variant([_PassThrough(length)] * count, count)}
    kept = attention_kept(model_config)
    for number, layers in enumerate(kinds):
        own = [index for index in layers if index < count]
        if 0 not in own:
            rest = [_PassThrough(length) if index in own else layer for index, layer in enumerate(dense)]
            variants["without", number] = _Variant(rest, len(own))
        for part, sizes in _grid(shape, layers, widest[layers[0]], head_unit, step):
            changed = [index for index in own if sizes[HEADS] or not widest[index][HEADS] or index not in kept]
            if changed:
                narrow = [made.layer(i, sizes) if i in changed else layer for i, layer in enumerate(dense)]
                variants[part, number, tuple(sorted(sizes.items()))] = _Variant(narrow, len(changed))
    whole, times = _timed_in_turn(made, dense, variants, ids.to(device), new_tokens, rounds=rounds, on_timed=on_timed)
    each = _dense_layers(whole, times, variants, kinds, count)
    rows = [
        _rows(whole, times, variants, number, each[number], widest[kinds[number][0]]) for number in range(len(kinds))
    ]
    return SpeedTable(
        engine="transformers",
        model=table_model(model_config),
        head_unit=head_unit,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        rest=times["rest",]._asdict(),
        kinds=tuple(LayerTimes(tuple(kind), *parts) for kind, parts in zip(kinds, rows)),
        machine={
            **timed_machine(device, dtype),
            "processors": os.cpu_count(),
            "machine": platform.machine(),
            "layers": count,
            "rounds": rounds,
            "versions": versions(device),
        },
    )


def layer_kinds(model_config: PreTrainedConfig, shape: ModelShape) -> list[list[int]]:
    """The layers of one kind each: with the same type of attention, or none, and an FFN or none."""
    text = text_config(model_config)
    types = getattr(text, "layer_types", None) or ["full_attention"] * len(shape.layers)
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(shape.layers):
        kinds.setdefault((types[index], bool(layer.sizes[HEADS]), layer.has_ffn), []).append(index)
    return list(kinds.values())


def _widest(shape: ModelShape, layers: Sequence[int]) -> dict[str, int]:
    """The largest sizes among some layers."""
    sizes = [shape.layers[index].sizes for index in layers]
    return {name: max(each[name] for each in sizes) for name in sizes[0]}


def _timed_layers(shape: ModelShape, kinds: Sequence[Sequence[int]], itemsize: int) -> int:
    """Number of the first layers that are timed: of every kind two if there are, and enough bytes."""
    count = max(layers[min(1, len(layers) - 1)] for layers in kinds) + 1
    while count < len(shape.layers) and itemsize * sum(x.parameters for x in shape.layers[:count]) < MODEL_BYTES:
        count += 1
    return count


def _grid(
    shape: ModelShape, layers: Sequence[int], widest: Sizes, head_unit: str, step: int
) -> list[tuple[str, dict[str, int]]]:
    """The widths to be timed beside the dense ones: those of heads, then those of channels."""
    grid: list[tuple[str, dict[str, int]]] = []
    units = head_units(dict(widest), head_unit)
    if any(head_unit in shape.layers[index].unit_parameters for index in layers):
        for keep in sorted({max(round(share * units), 1) for share in HEAD_SHARES} - {units}, reverse=True):
            narrow = {HEADS: widest[HEADS] * keep // units}
            if head_unit == "kv":
                narrow[KV_HEADS] = keep
            grid.append(("attention", {**widest, **narrow}))
    if any(shape.layers[index].attention_parameters for index in layers):
        grid.append(("attention", {**widest, HEADS: 0, KV_HEADS: 0}))
    if any(shape.layers[index].has_ffn for index in layers):
        size = widest[CHANNELS]
        widths = {step * (2 * round((share * size / step - 1) / 2) + 1) for share in CHANNEL_SHARES}
        grid += [("ffn", {**widest, CHANNELS: width}) for width in sorted(widths, reverse=True) if 0 < width < size]
    return grid


def _timed_in_turn(
    made: RandomModel,
    dense: list[nn.Module],
    variants: Mapping[tuple[Any, ...], _Variant],
    ids: Tensor,
    new_tokens: int,
    *,
    rounds: int,
    on_timed: OnTimed | None,
) -> tuple[Seconds, dict[tuple[Any, ...], Seconds]]:
    """The time of the dense model, and that of every variant: its median share of the dense model's, between those
    before and after it."""
    names = list(variants)
    groups = [names[start : start + BETWEEN_DENSE] for start in range(0, len(names), BETWEEN_DENSE)]
    total, number = (rounds + 1) * (len(names) + len(groups) + 1), 0
    shares: dict[tuple[Any, ...], list[Seconds]] = {name: [] for name in names}
    whole: list[Seconds] = []

    def timed(layers: list[nn.Module]) -> Seconds:
        nonlocal number
        start = time.perf_counter()
        made.set_layers(layers)
        seconds = request_seconds(made.model, ids, new_tokens)
        if on_timed:
            on_timed(number, total, time.perf_counter() - start)
        number += 1
        return seconds

    for turn in range(rounds + 1):
        before = timed(dense)
        for group in groups if turn % 2 else groups[::-1]:
            taken = {name: timed(variants[name].layers) for name in group}
            after = timed(dense)
            if turn:
                whole.append(after)
                for place, (name, seconds) in enumerate(taken.items(), start=1):
                    part = place / (len(taken) + 1)  # a machine that becomes slower does so little by little
                    drifted = [one + part * (two - one) for one, two in zip(before, after)]
                    shares[name].append(Seconds(*(mine / dense for mine, dense in zip(seconds, drifted))))
            before = after
    median = Seconds(*(statistics.median(part) for part in zip(*whole)))
    return median, {
        name: median.of(Seconds(*(statistics.median(part) for part in zip(*each)))) for name, each in shares.items()
    }


@torch.no_grad()
def request_seconds(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> Seconds:
    """Seconds of a prompt, and of each new token in the middle of those asked for.

    Args:
        ids: the prompts, ``(batch, prompt)``.

    Raises:
        PlanError: the model gives no cache back.
    """
    decoded = min(new_tokens, DECODED)
    skipped = (new_tokens - decoded) // 2
    start = synchronized_time(ids.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prompt = synchronized_time(ids.device) - start
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise PlanError(
            f"speedup: '{model.config.model_type}' gives no cache back, so that its new tokens cannot be timed; give a "
            "ratio"
        )
    if skipped:
        fill = ids[:, :1].expand(-1, skipped)
        cache = model(input_ids=fill, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    start = synchronized_time(ids.device)
    for _ in range(decoded):
        output = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        output.logits[:, -1:].argmax(-1)
    return Seconds(prompt, (synchronized_time(ids.device) - start) / decoded)


@torch.no_grad()
def _tuple_length(model: PreTrainedModel, layer: nn.Module, ids: Tensor) -> int:
    lengths = []
    handle = layer.register_forward_hook(
        lambda _module, _inputs, output: lengths.append(len(output) if isinstance(output, tuple) else 0)
    )
    model(input_ids=ids, use_cache=True)
    handle.remove()
    return lengths[0]


def _dense_layers(
    whole: Seconds,
    times: Mapping[tuple[Any, ...], Seconds],
    variants: Mapping[tuple[Any, ...], _Variant],
    kinds: Sequence[Sequence[int]],
    count: int,
) -> list[Seconds]:
    """The time of a dense layer of every kind; that of layer 0 is what the others and the rest leave over."""
    each: dict[int, Seconds] = {}
    left = Seconds(*(all_of - rest for all_of, rest in zip(whole, times["rest",])))
    for number in range(len(kinds)):
        if (without := times.get(("without", number))) is not None:
            changed = variants["without", number].changed
            each[number] = Seconds(*(max(a - b, 0.0) / changed for a, b in zip(whole, without)))
            left = Seconds(*(a - changed * b for a, b in zip(left, each[number])))
    (first,) = set(range(len(kinds))) - set(each)
    own = sum(index < count for index in kinds[first])
    each[first] = Seconds(*(max(part, 0.0) / own for part in left))
    return [each[number] for number in range(len(kinds))]


def _rows(
    whole: Seconds,
    times: Mapping[tuple[Any, ...], Seconds],
    variants: Mapping[tuple[Any, ...], _Variant],
    number: int,
    dense: Seconds,
    widest: Sizes,
) -> tuple[tuple[dict[str, float], ...], tuple[dict[str, float], ...]]:
    """The rows of a kind's attention and of its FFN, the dense ones first."""
    timed = [("attention", dict(widest), dense), ("ffn", dict(widest), dense)]
    for name, seconds in times.items():
        if name[0] in ("attention", "ffn") and name[1] == number:
            changed = variants[name].changed
            layer = Seconds(*(max(d + (t - w) / changed, 0.0) for d, t, w in zip(dense, seconds, whole)))
            timed.append((name[0], dict(name[2]), layer))
    attention = tuple(
        {"heads": sizes[HEADS], "kv_heads": sizes[KV_HEADS], **seconds._asdict()}
        for part, sizes, seconds in timed
        if part == "attention"
    )
    ffn = tuple({"channels": sizes[CHANNELS], **s._asdict()} for part, sizes, s in timed if part == "ffn")
    return attention, ffn
