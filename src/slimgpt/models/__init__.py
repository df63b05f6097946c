"""What a decoder is, described as data, and how to make one narrower."""

from slimgpt.models.architectures import SIZE_FIELDS, Architecture, Fused, Relabel, Structure
from slimgpt.models.families import ARCHITECTURES, REFUSED, register
from slimgpt.models.loading import load
from slimgpt.models.shape import LayerShape, ModelShape, describe

__all__ = [
    "ARCHITECTURES",
    "REFUSED",
    "SIZE_FIELDS",
    "Architecture",
    "Fused",
    "LayerShape",
    "ModelShape",
    "Relabel",
    "Structure",
    "describe",
    "load",
    "register",
]
