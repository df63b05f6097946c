"""One size of a model and its losses."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Loss:
    """Divergence of a pruned model from the dense one on one text.

    Args:
        kl: ``KL(dense || pruned)`` in nats per token.
        bits_per_byte: the KL divergence in bits per byte of the text.
        same_top: the share of tokens for which both find the same next token the most likely.
    """

    kl: float
    bits_per_byte: float
    same_top: float


@dataclass(frozen=True)
class ScanPoint:
    """One size.

    Args:
        ratio: the share of the decoder layers' parameters that is asked for.
        removed: the share that its widths remove.
        parameters: of the whole model.
        measured: whether the model was pruned to it; else its losses are predicted.
        prefill: how many times as fast prompts are read, as FLOPs promise it.
        decode: the same of new tokens, one after another.
        losses: by text, as a pruning report names them (``bundled``, ``held_out``).
    """

    ratio: float
    removed: float
    parameters: int
    measured: bool
    prefill: float
    decode: float
    losses: dict[str, Loss]
