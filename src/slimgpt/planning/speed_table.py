"""Times of a layer's parts by width, as measured on one machine, and the budget of time that is planned with them.

Depth and width cost time that parameters do not tell: heads cost more the longer the context is, and a matrix half as
wide is seldom twice as fast. ZipLM (arXiv 2302.04089) therefore prunes by a table of measured times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from slimgpt.errors import PlanError
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Sizes
from slimgpt.models.lookup import head_dim, text_config
from slimgpt.models.parameter_counts import ModelShape
from slimgpt.planning.ffn import FIELDS
from slimgpt.planning.plan import with_heads

SPEED_TABLE_FILE = "speed-table.json"
"""The table in the folder of a model that was pruned by it."""

NANOSECONDS = 1e9
"""Budgets of time are whole numbers of them, as large as those of parameters."""

PROTOCOL = {"on": "engine", "batch": "batch", "prompt": "prompt", "new_tokens": "new_tokens"}
"""The settings that say what is timed, and the keys of a table that say the same."""

MACHINE = ("device", "processor", "dtype", "threads")
"""The keys of a table's machine that its times depend on."""

WIDTHS = {"heads": HEADS, "kv_heads": KV_HEADS, "channels": CHANNELS}
"""The widths in rows of times, and what a layer calls them."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class LayerTimes:
    """Times of the layers of one kind.

    Args:
        layers: their indices.
        attention: rows with ``heads``, ``kv_heads`` and the seconds of a whole layer with so many heads and its widest
            FFN, for the ``prompt`` and for each new ``token``; the widest first. A row of 0 heads: without attention.
        ffn: rows with ``channels`` and the seconds of a whole layer with so many and all heads; the widest first.
    """

    layers: tuple[int, ...]
    attention: tuple[Row, ...]
    ffn: tuple[Row, ...]


@dataclass(frozen=True)
class SpeedTable:
    """The time of a request by the widths of the layers.

    Args:
        engine: what was timed: ``transformers``, ``vllm`` or ``llama.cpp``.
        model: what it is a table for: ``model_type``, ``hidden_size`` and ``num_hidden_layers``, and where they are
            known ``vocab_size`` and ``head_dim``.
        head_unit: how heads were removed, ``kv`` or ``query``.
        batch: prompts at once.
        prompt: tokens per prompt.
        new_tokens: tokens decoded after it.
        rest: seconds of all that is around the layers, for the ``prompt`` and for each new ``token``.
        kinds: times of the layers.
        machine: what it was measured on: ``device``, ``processor``, ``dtype`` and ``threads``, and more for people.
    """

    engine: str
    model: Mapping[str, Any]
    head_unit: str
    batch: int
    prompt: int
    new_tokens: int
    rest: Row
    kinds: tuple[LayerTimes, ...]
    machine: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SpeedTable:
        """The table that :meth:`to_json` was made from.

        Raises:
            ValueError: a key lacks or is unknown, or a time is no positive number.
        """
        try:
            kinds = tuple(
                LayerTimes(tuple(each["layers"]), tuple(each["attention"]), tuple(each["ffn"]))
                for each in values["kinds"]
            )
            table = cls(**{"machine": {}, **values, "kinds": kinds})
            rows = [table.rest, *(row for kind in kinds for row in (*kind.attention, *kind.ffn))]
            times = [row[phase] for row in rows for phase in ("prompt", "token")]
            sizes = [row["heads"] for kind in kinds for row in kind.attention]
            sizes += [row["channels"] for kind in kinds for row in kind.ffn]
        except (TypeError, KeyError) as error:
            raise ValueError(f"a key lacks or is unknown: {error}") from error
        if not all(isinstance(t, (int, float)) and math.isfinite(t) and t >= 0 for t in (*times, *sizes)):
            raise ValueError("a time or a width is no number of 0 or more")
        if not kinds or not all(kind.attention and kind.ffn for kind in kinds):
            raise ValueError("a kind of layers has no times")
        return table

    def seconds(self, row: Row) -> float:
        """Seconds of a request: its prompt and all its new tokens."""
        return row["prompt"] + self.new_tokens * row["token"]

    @cached_property
    def _curves(self) -> list[tuple[Curve, Curve]]:
        """By layer the seconds by heads and by channels."""
        curves = {}
        for kind in self.kinds:
            both = (
                Curve.fitted([(row["heads"], self.seconds(row)) for row in kind.attention]),
                Curve.fitted([(row["channels"], self.seconds(row)) for row in kind.ffn]),
            )
            curves |= dict.fromkeys(kind.layers, both)
        return [curves[index] for index in sorted(curves)]

    def heads_seconds(self, index: int, heads: int) -> float:
        """Seconds of a layer of so many heads and its widest FFN."""
        return self._curves[index][0](heads)

    def channels_seconds(self, index: int, channels: float) -> float:
        """Seconds of a layer of so many channels and all heads."""
        return self._curves[index][1](channels)

    def layer_seconds(self, index: int, sizes: Sizes) -> float:
        """Seconds of a layer of these widths: what its heads and its channels save is added up."""
        heads, channels = self._curves[index]
        return max(heads(sizes[HEADS]) + channels(sizes[CHANNELS]) - channels.widest, 0.0)

    def model_seconds(self, layers: Sequence[Sizes]) -> float:
        """Seconds of a request to a model of these widths."""
        return self.seconds(self.rest) + sum(self.layer_seconds(i, sizes) for i, sizes in enumerate(layers))


@dataclass(frozen=True)
class Curve:
    """Seconds by width, linear between the widths that were timed; no width is slower than a larger one.

    Args:
        widths: ascending.
        times: not descending.
    """

    widths: tuple[float, ...]
    times: tuple[float, ...]

    @classmethod
    def fitted(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """The curve nearest to timed points in least squares: neighbours that descend get their mean (pool adjacent
        violators)."""
        blocks: list[list[float]] = []  # time and number of points
        for _, time in sorted(points):
            blocks.append([time, 1])
            while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
                (one, a), (two, b) = blocks[-2:]
                blocks[-2:] = [[(one * a + two * b) / (a + b), a + b]]
        times = [time for time, count in blocks for _ in range(int(count))]
        return cls(tuple(width for width, _ in sorted(points)), tuple(times))

    @property
    def widest(self) -> float:
        """The time of the largest width."""
        return self.times[-1]

    def __call__(self, width: float) -> float:
        return float(np.interp(width, self.widths, self.times))


@dataclass(frozen=True)
class TimeBudget:
    """A budget of time, in nanoseconds of a request; see :class:`slimgpt.planning.budget.Budget`.

    Args:
        table: the times.
        shape: the dense model.
        target: what is to be saved.
    """

    table: SpeedTable
    shape: ModelShape
    target: float

    @property
    def total(self) -> float:
        layers = self.shape.layers
        return NANOSECONDS * sum(self.table.layer_seconds(index, layer.sizes) for index, layer in enumerate(layers))

    def of_structure(self, index: int, unit: str, keep: int) -> int:
        layer = self.shape.layers[index]
        if unit in FIELDS:
            return self._of_channels(index, keep)
        return self._of_heads(index, with_heads(layer, unit, keep, {})[HEADS])

    def of_layer(self, index: int, sizes: Sizes) -> int:
        return self._of_heads(index, sizes[HEADS]) + self._of_channels(index, sizes[CHANNELS])

    def channels_for(self, index: int, amount: float) -> float:
        low, high = 0.0, float(self.shape.layers[index].sizes[CHANNELS])
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._of_channels(index, middle) >= amount else (low, middle)
        return low

    def _of_heads(self, index: int, heads: int) -> int:
        dense = self.table.heads_seconds(index, self.shape.layers[index].sizes[HEADS])
        return round(NANOSECONDS * (dense - self.table.heads_seconds(index, heads)))

    def _of_channels(self, index: int, channels: float) -> int:
        dense = self.table.channels_seconds(index, self.shape.layers[index].sizes[CHANNELS])
        return round(NANOSECONDS * (dense - self.table.channels_seconds(index, channels)))


@dataclass(frozen=True)
class SpeedTarget:
    """The speedup of a request over the dense model that is asked for, and the times that it is planned with.

    Args:
        note: by what the machine of the times differs from this one; ``None`` if nothing is known to.
    """

    table: SpeedTable
    speedup: float
    note: str | None = None

    def budget(self, shape: ModelShape) -> TimeBudget:
        """The time that is to be saved."""
        dense = self.table.model_seconds([layer.sizes for layer in shape.layers])
        return TimeBudget(self.table, shape, math.ceil(NANOSECONDS * dense * (1 - 1 / self.speedup)))

    def promised(self, shape: ModelShape, layers: Sequence[Sizes]) -> float:
        """The speedup of a model of these widths by the table."""
        dense = self.table.model_seconds([layer.sizes for layer in shape.layers])
        return dense / self.table.model_seconds(layers)


def table_model(config: PreTrainedConfig) -> dict[str, Any]:
    """The description of its model in a table."""
    text = text_config(config)
    return {
        "model_type": config.model_type,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "head_dim": head_dim(text),
    }


def read_table(file: str | Path) -> SpeedTable:
    """The table of a file.

    Raises:
        PlanError: it cannot be read, or is none.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise PlanError(f"cannot read the speed table {file}: it does not exist, or is no regular file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        return SpeedTable.from_json(values)
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"cannot read the speed table {file}: {error}; remove it to measure anew") from error


def mismatch(
    table: SpeedTable,
    model: Mapping[str, Any],
    head_unit: str,
    protocol: Mapping[str, Any],
    *,
    layers: Sequence[Sizes],
) -> str | None:
    """Why a table does not serve for a model and a request; ``None`` if it does.

    Args:
        model: of :func:`table_model`.
        protocol: the settings ``on``, ``batch``, ``prompt`` and ``new_tokens``.
        layers: the widths of the dense model's layers.
    """
    for key, value in model.items():
        given = table.model.get(key, value if key in ("vocab_size", "head_dim") else None)
        if given != value:
            return f"it is for a model with {key} {given}, and this one has {value}"
    if table.head_unit != head_unit:
        return f"its heads were removed by '{table.head_unit}', and here they go by '{head_unit}'"
    for setting, key in PROTOCOL.items():
        if getattr(table, key) != protocol[setting]:
            return f"it was measured with {setting} {getattr(table, key)}, and {protocol[setting]} is asked for"
    known = sorted(index for kind in table.kinds for index in kind.layers)
    if known != list(range(model["num_hidden_layers"])):
        return "it does not have every layer once"
    for kind in table.kinds:
        timed = {
            "heads": max(row["heads"] for row in kind.attention),
            "kv_heads": max(row.get("kv_heads", 0) for row in kind.attention),
            "channels": max(row["channels"] for row in kind.ffn),
        }
        for key, field in WIDTHS.items():
            widest = max(layers[index][field] for index in kind.layers)
            if timed[key] != widest:
                return f"its layer {kind.layers[0]} has {key} {timed[key]} at most, and this model's has {widest}"
    return None


def other_machine(table: SpeedTable, machine: Mapping[str, Any]) -> str | None:
    """By what the machine of a table of transformers differs from another; ``None`` if nothing is known to.

    Args:
        machine: of :func:`slimgpt.runtime.versions.timed_machine`.
    """
    if table.engine != "transformers":
        return None
    keys = [key for key in MACHINE if key in table.machine and (key != "threads" or machine["device"] == "cpu")]
    differ = [
        f"{key} {table.machine[key]} there, {machine[key]} here" for key in keys if table.machine[key] != machine[key]
    ]
    return f"the times of the speed table were measured elsewhere: {'; '.join(differ)}" if differ else None
