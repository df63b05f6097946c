"""Train a slim model to win back what pruning lost; ends in the same kind of folder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from slimgpt.recovery.config import METHODS, RecoverConfig

if TYPE_CHECKING:
    from slimgpt.recovery.run import Recovery, recover
    from slimgpt.recovery.trainer import Step

__all__ = ["METHODS", "RecoverConfig", "Recovery", "Step", "recover"]

_HOME = {"Recovery": "run", "Step": "trainer", "recover": "run"}


def __getattr__(name: str) -> Any:
    """Import a name that needs torch when it is used: the command line derives its options from the settings."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
