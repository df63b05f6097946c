"""Descriptions of decoders as data: the pieces of which :mod:`slimgpt.models.families` makes its table.

Sizes have one name here whatever a family's config calls them: ``num_attention_heads``, ``num_key_value_heads`` and
``intermediate_size``; :attr:`Architecture.fields` says what the config calls them.

One rule reads the descriptions: with ``n`` units, unit ``u`` owns rows ``[u * len / n, (u + 1) * len / n)`` of every
tied axis of length ``len``. It gives the query rows of a KV head, key and value rows, biases and FFN rows alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimgpt.models.modeling_slim import skips_attention

Sizes = Mapping[str, int]

HEADS, KV_HEADS, CHANNELS = "num_attention_heads", "num_key_value_heads", "intermediate_size"

SIZE_FIELDS = (HEADS, KV_HEADS, CHANNELS)
"""The names of the sizes that say how wide a layer is."""


@dataclass(frozen=True)
class Fused:
    """One module that stacks the output rows of several projections.

    Args:
        module: its name in the layer, such as ``self_attn.qkv_proj``.
        parts: for each projection, in row order, the size its row count is proportional to.
        sliced: positions of the parts whose rows go with the removed units.
        blocks: a size (or a number): the rows are that many equal blocks, and each of them stacks the parts; GPT-NeoX
            has one block per head, Falcon one per KV head.
    """

    module: str
    parts: tuple[str, ...]
    sliced: tuple[int, ...]
    blocks: str | int = 1

    def block_count(self, sizes: Sizes) -> int:
        """Into how many blocks the rows of a layer of these sizes fall."""
        return sizes[self.blocks] if isinstance(self.blocks, str) else self.blocks


@dataclass(frozen=True)
class Structure:
    """Weights that are removed together.

    Args:
        unit: what is counted: ``kv`` (KV heads with all their query heads; in multi-head attention: heads), ``query``
            (query heads, the same number from every KV group) or ``ffn`` (intermediate channels). A layer's structures
            with the same :attr:`name` are alternatives.
        output: the linear module whose input columns are scored and repaired.
        inputs: the modules whose output rows (weight and bias) go with those columns, and single parameters that have
            one row per unit.
        sizes: the sizes that shrink with it; the first one counts the units.
        groups: a size that counts groups of neighbouring units, all of which lose the same number; ``None`` leaves the
            choice free.
        transposed: whether the modules hold ``(in, out)`` weights, as GPT-2's Conv1D does.
    """

    unit: str
    output: str
    inputs: tuple[str | Fused, ...]
    sizes: tuple[str, ...]
    groups: str | None = None
    transposed: bool = False

    @property
    def name(self) -> str:
        """Its name in reports: ``heads`` or ``channels``."""
        return {"kv": "heads", "query": "heads", "ffn": "channels"}.get(self.unit, self.unit)

    @property
    def container(self) -> str:
        """The module that holds the output matrix, such as ``self_attn``; empty where it lies in the layer itself."""
        return self.output.rpartition(".")[0]

    @property
    def key(self) -> str:
        """The name of the output matrix in a layer's state dict."""
        return f"{self.output}.weight"

    @property
    def modules(self) -> tuple[str, ...]:
        """The output module and the input modules."""
        return (self.output, *(item if isinstance(item, str) else item.module for item in self.inputs))

    def units(self, sizes: Sizes) -> int:
        """Number of units in a layer of these sizes."""
        return sizes[self.sizes[0]]

    def group_count(self, sizes: Sizes) -> int:
        """Number of groups of the units in a layer of these sizes; 1 where the choice is free."""
        return sizes[self.groups] if self.groups else 1

    def shrink(self, sizes: Sizes, keep: int) -> dict[str, int]:
        """The sizes of the layer once ``keep`` units are left."""
        units = self.units(sizes)
        return {**sizes, **{name: sizes[name] * keep // units for name in self.sizes}}


@dataclass(frozen=True)
class Relabel:
    """A stock class that computes the same function where the family's own config refuses a head count."""

    model_type: str
    fields: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Shares:
    """Keys and values that a layer leaves for later ones, in a dict that all layers are called with.

    Args:
        argument: the name of that argument.
        left: from the language model's config, for every layer the key under which it leaves them; ``None`` where it
            leaves none.
    """

    argument: str
    left: Callable[[Any], Sequence[str | None]]


@dataclass(frozen=True)
class Architecture:
    """A decoder family: where its layers are and what can be removed from one.

    Args:
        structures: what can be removed, in forward order; those of one name are alternatives. A layer that lacks the
            modules of one (a layer without attention, a dense layer among layers of experts) keeps what it has.
        layers: the module list that holds the decoder layers.
        fields: what the config calls a size, where it is not the name used here.
        defaults: a size that the config does not write down; by default KV heads are the heads, and the FFN has four
            times the hidden size.
        resized: the layer's constructor takes its head size as ``hidden_size / heads`` or no FFN width at all. Layers
            are then built at full width and get matrices of other shapes, and attention is built as if the hidden
            size were heads times head size.
        relabel: see :class:`Relabel`.
        refused: why something cannot be removed, by the name of what it is: ``heads``.
        varying: config fields that differ by layer in the dense model already, in its ``per_layer_config``; they stay.
        attention: what goes with the whole attention of a layer: its module, then the norms that serve nothing else;
            empty where a layer cannot do without. A layer without has 0 heads.
        by_batch: arguments of a layer that are computed from the tokens, and so differ by batch, with the config field
            of their size.
        shares: see :class:`Shares`; ``None`` where no layer reads what another one has left.
        times_ffn: how many times the FFN width of the config a layer has, by its config and index.
        with_widths: config fields that are written with widths, after which each layer has the one that is written.
    """

    structures: tuple[Structure, ...]
    layers: str = "model.layers"
    fields: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    resized: bool = False
    relabel: Relabel | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    varying: frozenset[str] = frozenset()
    attention: tuple[str, ...] = ()
    by_batch: Mapping[str, str] = field(default_factory=dict)
    shares: Shares | None = None
    times_ffn: Callable[[Any, int], int] | None = None
    with_widths: Mapping[str, Any] = field(default_factory=dict)

    def find(self, unit: str) -> Structure | None:
        """The structure that is removed by this unit, if there is one."""
        return next((structure for structure in self.structures if structure.unit == unit), None)

    def chosen(self, head_unit: str) -> tuple[Structure, ...]:
        """The structures of a plan: of the two that remove heads, the one by ``head_unit`` (``kv`` or ``query``)."""
        return tuple(s for s in self.structures if s.name != "heads" or s.unit == head_unit)

    def rows(self) -> dict[str, tuple[str, ...]]:
        """For every input module, the sizes that its output rows are proportional to, in order (within a block)."""
        queries = self.find("query")
        fields: dict[str, tuple[str, ...]] = {}
        for structure in self.structures:
            for item in structure.inputs:
                if isinstance(item, Fused):
                    fields[item.module] = item.parts
                elif structure.name != "heads":
                    fields[item] = (structure.sizes[0],)
                else:
                    fields[item] = (HEADS,) if queries is None or item in queries.inputs else (KV_HEADS,)
        return fields

    def columns(self) -> dict[str, str]:
        """For every output module, the size that its input columns are proportional to."""
        return {s.output: HEADS if s.name == "heads" else s.sizes[0] for s in self.structures}

    def read(self, config: Any, index: int = 0) -> dict[str, int]:
        """The sizes of a layer from its config.

        Args:
            index: of the layer, where layers of a model are of different kinds.
        """
        sizes = {}
        for name in SIZE_FIELDS:
            value = getattr(config, self.fields.get(name, name), None)
            if value is None:
                value = self.defaults.get(name)
            if value is None:
                value = sizes[HEADS] if name == KV_HEADS else 4 * config.hidden_size
            sizes[name] = int(value)
        if self.times_ffn is not None:
            sizes[CHANNELS] *= self.times_ffn(config, index)
        return {**sizes, HEADS: 0, KV_HEADS: 0} if skips_attention(config) else sizes

    def write(self, sizes: Sizes) -> dict[str, Any]:
        """The config fields that say these sizes; a layer without attention skips it."""
        if sizes.get(HEADS) == 0:
            rest = {name: value for name, value in sizes.items() if name not in (HEADS, KV_HEADS)}
            return {**self.write(rest), "skip": ["attention"]}
        return {**{self.fields.get(name, name): value for name, value in sizes.items()}, **self.with_widths}


Entry = Architecture | Callable[[Any], "Architecture | str"]
"""What a table of families holds: a description, or a function of the config where flags of it change the layout; it
may give the reason why a model with such flags is refused."""


def is_uniform(layers: Sequence[Sizes]) -> bool:
    """Whether all layers have the same widths."""
    return all(layer == layers[0] for layer in layers)
