"""Train a slim model to win back what pruning lost; ends in the same kind of folder."""

from slimgpt.recovery.config import METHODS, RecoverConfig
from slimgpt.recovery.run import Recovery, recover
from slimgpt.recovery.trainer import Step

__all__ = ["METHODS", "RecoverConfig", "Recovery", "Step", "recover"]
