"""The families of transformers, as data: one table, and the reasons why others are refused."""

from slimgpt.errors import UsageError
from slimgpt.models.architecture import Entry
from slimgpt.models.families.dense import DENSE, LLAMA, ffn, gated, grouped, heads, in_module
from slimgpt.models.families.mixtures import MIXTURES
from slimgpt.models.families.moe import Mixture
from slimgpt.models.families.multimodal import MULTIMODAL, PARTS
from slimgpt.models.families.refused import REFUSED

ARCHITECTURES: dict[str, Entry] = {**DENSE, **MIXTURES}
"""Supported families by ``config.model_type``."""


def register(model_type: str, architecture: Entry) -> None:
    """Describe a family of your own; everything then works for it as for those of the table.

    Args:
        model_type: what its config calls itself. ``transformers`` must have a causal LM class for the config, or the
            model's repository, whose code runs with ``trust_remote_code=True``.
        architecture: see ``docs/adding-a-family.md``.

    Raises:
        UsageError: the family is in the table already, or is a mixture whose class does not take every width.
    """
    if model_type in ARCHITECTURES:
        raise UsageError(f"model_type '{model_type}' is described already: slimgpt.ARCHITECTURES['{model_type}']")
    if isinstance(architecture, Mixture) and architecture.resized:
        raise UsageError(
            f"model_type '{model_type}': resized=True cannot give stacked experts other widths; let the class read "
            "head_dim and the experts' width from its config"
        )
    ARCHITECTURES[model_type] = architecture


__all__ = [
    "ARCHITECTURES",
    "LLAMA",
    "MULTIMODAL",
    "PARTS",
    "REFUSED",
    "ffn",
    "gated",
    "grouped",
    "heads",
    "in_module",
    "register",
]
