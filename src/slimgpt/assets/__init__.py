"""Material from PyPI (the demo's model and text, wheels that hold data), and a text that is part of the package."""

from slimgpt.assets.demo import DEMO, MODEL_NAME, MODEL_WHEEL, TEXT_WHEEL, demo_documents, demo_model
from slimgpt.assets.general import general_text
from slimgpt.assets.pypi import Wheel, cache_folder, fetch

__all__ = [
    "DEMO",
    "MODEL_NAME",
    "MODEL_WHEEL",
    "TEXT_WHEEL",
    "Wheel",
    "cache_folder",
    "demo_documents",
    "demo_model",
    "fetch",
    "general_text",
]
