"""Ctrl-C as :class:`KeyboardInterrupt`, also where a library makes another exception of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_arrived = False


def heed_interrupts() -> None:
    """Let SIGTERM and, unless it is ignored, SIGINT raise :class:`KeyboardInterrupt` in the main thread."""
    global _arrived
    _arrived = False
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)


def end_on_interrupts() -> None:
    """Let SIGTERM and SIGINT end the process at once, without an exception: nothing is left to clear away."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Ignore SIGTERM and SIGINT in a short block, that an ended command may clear away and say why it ends.

    torchrun sends SIGTERM to every process as soon as one has died, when the others may already be about to say that
    they lost contact. Outside of the main thread, where Python delivers no signal, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def interrupts_restored() -> Iterator[None]:
    """Raise :class:`KeyboardInterrupt` for any error of the block that comes after a signal.

    C code that calls Python may replace the exception: torch, while it makes a tensor of a storage, says that it cannot
    determine the storage's shape.
    """
    try:
        yield
    except Exception as error:
        if _arrived:
            raise KeyboardInterrupt from error
        raise


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    global _arrived
    _arrived = True
    raise KeyboardInterrupt
