"""A signal ends a command as an interrupt, whatever a library makes of it."""

from __future__ import annotations

import os
import signal

import pytest

from slimgpt.runtime import interrupts
from slimgpt.runtime.interrupts import heed_interrupts, interrupts_restored


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    monkeypatch.setattr(interrupts, "_arrived", False)  # as it was, afterwards
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    heed_interrupts()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def library(number: int) -> None:
    """What C code does that is interrupted inside Python."""
    try:
        os.kill(os.getpid(), number)
        for _ in range(10_000):  # until Python looks for signals
            pass
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape") from None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_error_after_a_signal_is_an_interrupt(number):
    with pytest.raises(KeyboardInterrupt) as stop, interrupts_restored():
        library(number)
    assert isinstance(stop.value.__cause__, ValueError)


def test_an_error_without_a_signal_stays():
    with pytest.raises(ValueError, match="shape"), interrupts_restored():
        raise ValueError("shape")


def test_a_new_command_begins_anew():
    with pytest.raises(KeyboardInterrupt), interrupts_restored():
        library(signal.SIGINT)
    heed_interrupts()
    with pytest.raises(ValueError, match="shape"), interrupts_restored():
        raise ValueError("shape")


def test_an_ignored_interrupt_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    heed_interrupts()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
