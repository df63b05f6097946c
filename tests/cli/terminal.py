"""Commands in a pseudo-terminal: what a person sees who has so many columns."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path

MARK = "=== command"
DEMO = "SLIMGPT_TEST_DEMO"
"""The environment variable with a GGUF file and a text that stand for the demo's, which are large."""

DRIVER = f"""
import os
import sys
from pathlib import Path
from slimgpt import assets
from slimgpt.__main__ import main
if "{DEMO}" in os.environ:
    model, text = os.environ["{DEMO}"].split(os.pathsep)
    assets.demo_model = lambda: Path(model)
    assets.demo_documents = lambda: ([Path(text).read_text()], [Path(text).read_text()])
commands, command = [], []
for word in [*sys.argv[1:], "+++"]:
    if word == "+++":
        commands.append(command)
        command = []
    else:
        command.append(word)
for command in commands:
    print("{MARK}", flush=True)
    sys.argv = ["slimgpt", *command]
    try:
        main()
    except SystemExit as leave:
        if leave.code:
            print("{MARK} failed", leave.code, flush=True)
"""
"""Several commands in one process: importing torch is most of a tiny run."""

CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07|\x1b.")


def in_terminal(commands: Sequence[Sequence[str]], columns: int, folder: Path, **more: str) -> list[list[str]]:
    """Run commands with a terminal as their standard input, output and error.

    Returns:
        For each of them its lines without colours, every frame of a bar as a line of its own.
    """
    # A cursor that goes up begins a frame of all bars; a carriage return begins a line again.
    lines = re.split(r"\r\n|\r|\n|\x1b\[\d*A", raw_output(commands, columns, folder, **more))
    seen = [CONTROL.sub("", line).rstrip() for line in lines]
    each: list[list[str]] = []
    for line in seen:
        if line == MARK:
            each.append([])
        elif line and each:
            each[-1].append(line)
    return each


def raw_output(commands: Sequence[Sequence[str]], columns: int, folder: Path, **more: str) -> str:
    """What commands write to a terminal of so many columns, with :data:`MARK` before each.

    Args:
        more: environment variables.
    """
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    words: list[str] = []
    for command in commands:
        words += [*(["+++"] if words else []), *command]
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *words],
        stdin=secondary, stdout=secondary, stderr=secondary, cwd=folder, start_new_session=True,
        env={**environment, **more, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(secondary)
    output = b""
    while True:
        try:
            block = os.read(primary, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not block:
            break
        output += block
    os.close(primary)
    assert process.wait() == 0, output.decode(errors="replace")
    return output.decode()


def screens(output: str) -> Iterator[list[str]]:
    """The screen after every line that was written, with its colours; lines that were drawn over are gone."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[\d*[A-Z]|\r|\n|(?:[^\r\n\x1b]|\x1b\[[\d;]*m|\x1b(?!\[\d*[A-Z]))+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            yield lines
        elif up := re.fullmatch(r"\x1b\[(\d*)A", token):
            row = max(0, row - int(up[1] or 1))
        elif token.endswith("K"):
            lines[row] = ""
        elif not CONTROL.fullmatch(token):
            lines[row] += token
    yield lines
