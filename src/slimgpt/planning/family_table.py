"""The table of families with the engines that run what is made of each: for `slimgpt families` and docs/families.md."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from transformers import PreTrainedConfig

from slimgpt.models.architecture import CHANNELS, Sizes
from slimgpt.models.families.support import Support, families, supported_config
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.planning.engines import engine_support
from slimgpt.planning.stock_forms import uniform_problem


@dataclass(frozen=True)
class FamilyRow(Support):
    """One family of the table.

    Args:
        engines: engines that run layers of different widths.
        engines_uniform: those that run equal layers; none where layers cannot be equal.
    """

    engines: tuple[str, ...] = ()
    engines_uniform: tuple[str, ...] = ()

    def engines_text(self) -> str:
        """The engines for people: those for layers of any width, then those that equal layers add."""
        more = [name for name in self.engines_uniform if name not in self.engines]
        return ", ".join(self.engines) + (f"; equal layers: {', '.join(more)}" if more else "")


def with_engines(family: Support) -> FamilyRow:
    """A family with its engines, by the default config of its type; none for one that is refused."""
    config = supported_config(family.model_type) if family.units else None
    values = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    if config is None or lookup(config) is None:
        return FamilyRow(**values)
    dense = layer_sizes(config)
    narrow = [{**sizes, CHANNELS: _half(sizes)} for sizes in dense]
    uniform = _run_by(config, narrow) if uniform_problem(config) is None else ()
    return FamilyRow(**values, engines=_run_by(config, [*dense[:-1], narrow[-1]]), engines_uniform=uniform)


def family_rows() -> list[FamilyRow]:
    """Every family of the table, with its engines."""
    return [with_engines(family) for family in families()]


def _half(sizes: Sizes) -> int:
    return max(sizes[CHANNELS] // 2, 1)


def _run_by(config: PreTrainedConfig, layers: list[dict[str, int]]) -> tuple[str, ...]:
    verdicts = engine_support(copy.deepcopy(config), layers)
    return tuple(verdict.engine for verdict in verdicts if verdict.runs)
