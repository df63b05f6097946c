"""The table of families in words: what can be removed from each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from slimgpt.models.architecture import CHANNELS, Architecture, Entry, Structure
from slimgpt.models.families import ARCHITECTURES, MULTIMODAL, PARTS, REFUSED
from slimgpt.models.families.moe import Experts, Mixture
from slimgpt.models.families.names import KNOWN_AS

UNIT_NAMES = {"kv": "KV groups", "query": "query heads", "ffn": "FFN channels", "shared": "shared expert"}
"""What is removed, by :attr:`Structure.unit`."""

_SUPPORTED = {
    "dots1": {"n_routed_experts": 128},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 31},
}
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
        inside: the module of the language model in a multimodal one; empty for what is a language model alone.
        known_as: models of the family that people know, by their names.
    """

    model_type: str
    units: tuple[str, ...]
    uniform: tuple[str, ...] = ()
    note: str = ""
    inside: str = ""
    known_as: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """``supported``, ``FFN only`` or ``refused``."""
        if not self.units:
            return "refused"
        return "supported" if {"heads", UNIT_NAMES["kv"], UNIT_NAMES["query"]} & set(self.units) else "FFN only"


def families() -> list[Support]:
    """Every family that somebody has looked at; where the layout hangs on the config, as its defaults have it."""
    entries = [_described(model_type, ARCHITECTURES[model_type], _default(model_type)) for model_type in ARCHITECTURES]
    entries += [_multimodal(model_type) for model_type in MULTIMODAL]
    entries += [Support(model_type, (), note=reason) for model_type, reason in REFUSED.items()]
    return [dataclasses.replace(family, known_as=KNOWN_AS.get(family.model_type, ())) for family in entries]


def supported_config(model_type: str) -> PreTrainedConfig | None:
    """The default config of a type, with values for which it is supported; ``None`` for a type of the user's own."""
    config = _default(model_type)
    if config is not None:
        text = config.get_text_config(decoder=True)
        for name, value in _SUPPORTED.get(text.model_type, {}).items():
            setattr(text, name, value)
    return config


def _default(model_type: str) -> PreTrainedConfig | None:
    try:
        return AutoConfig.for_model(model_type)
    except ValueError:  # registered by the user, with a config class that transformers does not know by name
        return None


def _multimodal(model_type: str) -> Support:
    """The language model inside, as the default config has it."""
    text = AutoConfig.for_model(model_type).get_text_config(decoder=True)
    entry = ARCHITECTURES[text.model_type] if text.model_type in ARCHITECTURES else PARTS[text.model_type]
    if isinstance(entry, Architecture):
        entry = dataclasses.replace(entry, relabel=None)  # no other type holds the whole model
    family = _described(text.model_type, entry, text)
    note = "; ".join(filter(None, [f"{text.model_type} inside, all else stays", family.note]))
    return dataclasses.replace(family, model_type=model_type, note=note, inside=MULTIMODAL[model_type])


def _described(model_type: str, entry: Entry, config: PreTrainedConfig | None) -> Support:
    notes, layout = [], entry(config) if callable(entry) else entry
    if callable(entry):
        notes.append("the layout depends on the config")
        if isinstance(layout, str):  # as the defaults have it; others are supported
            notes = [f"not where {layout}"]
            layout = entry(AutoConfig.for_model(model_type, **_SUPPORTED[model_type]))
    assert isinstance(layout, Architecture)
    units = tuple(dict.fromkeys(_name(structure, layout) for structure in layout.structures))
    kept_by_stock = [s for s in layout.structures if _in_stock_class(s.unit, layout, config)]
    stock = tuple(dict.fromkeys(_name(structure, layout) for structure in kept_by_stock))
    if isinstance(layout, Mixture) and len({type(s) for s in layout.structures if s.unit == "ffn"}) > 1:
        notes.append("uniform where every layer has experts")
    notes += [f"no {part}: {why}" for part, why in layout.refused.items()]
    if layout.relabel is not None:
        notes.append(f"a head count that its config refuses is saved as {layout.relabel.model_type}")
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
