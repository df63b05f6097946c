"""Decoders described as data, and how to make one narrower."""

from slimgpt.models.architecture import SIZE_FIELDS, Architecture, Fused, Relabel, Structure
from slimgpt.models.families import ARCHITECTURES, REFUSED, register
from slimgpt.models.families.moe import EXPERTS, SHARED, Experts, Mixture
from slimgpt.models.loading import load
from slimgpt.models.parameter_counts import LayerShape, ModelShape, describe

__all__ = [
    "ARCHITECTURES",
    "EXPERTS",
    "REFUSED",
    "SHARED",
    "SIZE_FIELDS",
    "Architecture",
    "Experts",
    "Fused",
    "LayerShape",
    "Mixture",
    "ModelShape",
    "Relabel",
    "Structure",
    "describe",
    "load",
    "register",
]
