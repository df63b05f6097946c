"""What can be removed from each family, as data.

One rule reads the descriptions: with ``n`` units, unit ``u`` owns rows ``[u * len / n, (u + 1) * len / n)`` of every
tied axis of length ``len``. It gives the query rows of a KV head, key and value rows, biases and FFN rows alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Fused:
    """One module that stacks the output rows of several projections.

    Args:
        module: its name in the layer, such as ``self_attn.qkv_proj``.
        parts: for each projection, in row order, the config field its row count is proportional to.
        sliced: positions of the parts whose rows go with the removed units.
    """

    module: str
    parts: tuple[str, ...]
    sliced: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """Weights that are removed together.

    Args:
        output: the linear module whose input columns are scored and repaired.
        inputs: the modules whose output rows (weight and bias) go with those columns.
        sizes: the config fields that shrink with it; the first one counts the units.
        groups: a config field that counts groups of neighbouring units, all of which lose the same number;
            ``None`` leaves the choice free.
    """

    output: str
    inputs: tuple[str | Fused, ...]
    sizes: tuple[str, ...]
    groups: str | None = None

    @property
    def container(self) -> str:
        """The module whose output is the output matrix's output, such as ``self_attn``."""
        return self.output.rpartition(".")[0]

    def units(self, sizes: Sizes) -> int:
        """How many units a layer of these sizes has."""
        return sizes[self.sizes[0]]

    def group_count(self, sizes: Sizes) -> int:
        """In how many groups the units of a layer of these sizes fall; 1 where the choice is free."""
        return sizes[self.groups] if self.groups else 1

    def shrink(self, sizes: Sizes, keep: int) -> dict[str, int]:
        """The sizes of the layer once ``keep`` units are left."""
        units = self.units(sizes)
        return {**sizes, **{field: sizes[field] * keep // units for field in self.sizes}}


@dataclass(frozen=True)
class Relabel:
    """A stock class that computes the same function where the family's own config refuses a head count."""

    model_type: str
    fields: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Architecture:
    """A decoder family: where its layers are and what can be removed from one.

    Args:
        attention: whole KV heads with all their query heads (in multi-head attention: heads).
        queries: single query heads, the same number from every KV group.
        ffn: intermediate channels.
        layers: the module list that holds the decoder layers.
        relabel: see :class:`Relabel`.
    """

    attention: Structure
    queries: Structure
    ffn: Structure
    layers: str = "model.layers"
    relabel: Relabel | None = None

    def heads(self, head_unit: str) -> Structure:
        """The structure that ``head_unit`` (``kv`` or ``query``) removes heads by."""
        return self.queries if head_unit == "query" else self.attention


_KV_UNIT = ("num_key_value_heads", "num_attention_heads")
_QUERY_UNIT = ("num_attention_heads",)
_QKV = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")

_SEPARATE = Architecture(
    attention=Structure("self_attn.o_proj", tuple(f"self_attn.{p}_proj" for p in "qkv"), _KV_UNIT),
    queries=Structure("self_attn.o_proj", ("self_attn.q_proj",), _QUERY_UNIT, "num_key_value_heads"),
    ffn=Structure("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj"), ("intermediate_size",)),
)

_LLAMA = Architecture(
    _SEPARATE.attention,
    _SEPARATE.queries,
    _SEPARATE.ffn,
    relabel=Relabel("mistral", (("sliding_window", None),)),
)

_PHI3 = Architecture(
    attention=Structure("self_attn.o_proj", (Fused("self_attn.qkv_proj", _QKV, (0, 1, 2)),), _KV_UNIT),
    queries=Structure(
        "self_attn.o_proj", (Fused("self_attn.qkv_proj", _QKV, (0,)),), _QUERY_UNIT, "num_key_value_heads"
    ),
    ffn=Structure(
        "mlp.down_proj", (Fused("mlp.gate_up_proj", ("intermediate_size",) * 2, (0, 1)),), ("intermediate_size",)
    ),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gemma2": _SEPARATE,
    "gemma3_text": _SEPARATE,
    "granite": _SEPARATE,
    "smollm3": _SEPARATE,
    "phi3": _PHI3,
}
"""Supported families by ``config.model_type``."""

SIZE_FIELDS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""The config fields that say how wide a layer is."""
