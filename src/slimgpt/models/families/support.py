"""What can be removed from every family of the table, for people."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import AutoConfig

from slimgpt.models.architecture import CHANNELS, Architecture, Structure
from slimgpt.models.families import ARCHITECTURES, REFUSED
from slimgpt.models.families.moe import Experts, Mixture

UNIT_NAMES = {"kv": "KV groups", "query": "query heads", "ffn": "FFN channels", "shared": "shared expert"}
"""What is removed, by :attr:`Structure.unit`."""

_SUPPORTED = {name: {"hidden_size_per_layer_input": 0} for name in ("gemma4_text", "gemma4_unified_text")}
"""Values with which a family is supported whose default config is not."""

EXPERT_UNITS = "whole experts and channels of each"


@dataclass(frozen=True)
class Support:
    """One family.

    Args:
        units: what can be removed; empty for a family that is refused.
        uniform: which of it a stock class of transformers holds where all layers are equal; the rest, and layers that
            differ, load with the modeling file in the folder.
        note: why something stays, or why the family is refused.
    """

    model_type: str
    units: tuple[str, ...]
    uniform: tuple[str, ...] = ()
    note: str = ""

    @property
    def level(self) -> str:
        """``supported``, ``FFN only`` or ``refused``."""
        if not self.units:
            return "refused"
        return "supported" if {"heads", UNIT_NAMES["kv"], UNIT_NAMES["query"]} & set(self.units) else "FFN only"


def families() -> list[Support]:
    """Every family that somebody has looked at; where the layout hangs on the config, as its defaults have it."""
    entries = [_described(model_type) for model_type in ARCHITECTURES]
    return entries + [Support(model_type, (), note=reason) for model_type, reason in REFUSED.items()]


def _described(model_type: str) -> Support:
    entry, notes = ARCHITECTURES[model_type], []
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:  # registered by the user, with a config class that transformers does not know by name
        config = None
    if callable(entry):
        notes.append("the layout depends on the config")
        entry = entry(config)
    if isinstance(entry, str):  # as the defaults have it; others are supported
        notes = [f"not where {entry}"]
        entry = ARCHITECTURES[model_type](AutoConfig.for_model(model_type, **_SUPPORTED[model_type]))  # type: ignore
    assert isinstance(entry, Architecture)
    units = tuple(dict.fromkeys(_name(structure, entry) for structure in entry.structures))
    here = [s for s in entry.structures if _in_stock_class(s.unit, entry, config)]
    stock = tuple(dict.fromkeys(_name(structure, entry) for structure in here))
    if isinstance(entry, Mixture) and len({type(s) for s in entry.structures if s.unit == "ffn"}) > 1:
        notes.append("uniform where every layer has experts")
    notes += [f"no {part}: {why}" for part, why in entry.refused.items()]
    if entry.relabel is not None:
        notes.append(f"a head count that its config refuses is saved as {entry.relabel.model_type}")
    return Support(model_type, units, stock, "; ".join(notes))


def _in_stock_class(unit: str, architecture: Architecture, config: object) -> bool:
    if not architecture.resized:
        return True
    if config is None or unit != "ffn":
        return False
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    return architecture.fields.get(CHANNELS, CHANNELS) in known


def _name(structure: Structure, architecture: Architecture) -> str:
    unit = structure.unit
    if isinstance(structure, Experts):
        return EXPERT_UNITS
    if unit == "kv" and architecture.find("query") is None:
        return "heads"
    return UNIT_NAMES.get(unit, unit)
