"""The end of a launcher and of all that it has started."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import psutil


def kill(process: subprocess.Popen) -> None:
    """Kill a launcher and what it has started, which would go on without it: it has sessions of its own."""
    launcher = psutil.Process(process.pid)
    for each in (launcher, *launcher.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate(timeout=60)
