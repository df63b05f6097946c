"""What every long command shows in a terminal of 80 and of 120 columns: bars with phase, count and time left first,
nothing of other libraries, and no line that is longer than the terminal."""

from __future__ import annotations

import os
import re

import pytest

import slimgpt
from tests.cli.terminal import DEMO, in_terminal
from tests.models.families import tiny_model

LEAKS = (
    "Reading global config", "fatal:", "Writing:", "Loading weights", "it/s", "WARNING", "Traceback", "tqdm",
)  # fmt: skip

BAR = re.compile(
    r"^(?P<phase>[a-z][\w ,./-]*?) +"  # what is done comes first
    r"((?P<count>(layer |step )?[\d,]+/[\d,]+) +(?P<time>ETA (\d+:)?\d+:\d\d|ETA -:--|in (\d+:)?\d+:\d\d) +)?"
    r"[━╸╺ ]{10,}(?P<state>.*)$"
)


@pytest.fixture(scope="module")
def demo_model(tokenizer, tmp_path_factory):
    """A GGUF file in place of the demo's: a tiny model with room for the texts that the demo measures."""
    root = tmp_path_factory.mktemp("demo")
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(root / "folder")
    tokenizer.save_pretrained(root / "folder")
    slimgpt.export(root / "folder", root / "model.gguf", "gguf", quantize="F32", check=False)
    return root / "model.gguf"


@pytest.fixture(scope="module", params=[80, pytest.param(120, marks=pytest.mark.slow)])
def captures(request, dense_folder, text_file, demo_model, tmp_path_factory) -> tuple[int, dict[str, list[str]]]:
    """The lines of every command, by its name.

    In the wide one no process is started for the peak memory of each model, which shows no bar.
    """
    dense, text = str(dense_folder), str(text_file)
    in_compare, in_speed = ([], []) if request.param == 80 else (["--no-speed"], ["--no-memory"])
    text_options = ["--calibration", text, "--num-samples", "16", "--seq-len", "64"]
    commands = {
        "prune": ["prune", dense, "slim", "--ratio", "0.3", *text_options, "--distill", "1500"],
        "prune --export": ["prune", dense, "other", "--allocation", "schedule", *text_options, "--export", "padded"],
        "recover": [
            "recover", "slim", "better", "--data", text, "--method", "distill", "--teacher", dense, "--max-steps", "4",
            "--batch-size", "4", "--max-length", "32", "--held-out", "4",
        ],
        "compare": [
            "compare", dense, "slim", "--text", text, "--window", "64", "--prompt", "16", "--new-tokens", "4",
            "--rounds", "1", "--samples", "1", *in_compare,
        ],
        "evaluate": ["evaluate", "slim", "--against", dense, "--text", text, "--window", "64"],
        "export": ["export", "slim", "slim.gguf", "--to", "gguf", "--quantize", "F32"],
        "verify": ["verify", "other-padded", "--against", "other"],
        "speed": ["speed", "slim", "--prompt", "16", "--new-tokens", "4", "--rounds", "1", *in_speed],
        "generate": ["generate", "slim", "The river", "--max-new-tokens", "4"],
        "demo": ["demo", "shown", "--num-samples", "16", "--seq-len", "64"],
        "plan": ["plan", dense],
        "inspect": ["inspect", "slim"],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp(f"terminal-{request.param}")
    stand_in = {DEMO: f"{demo_model}{os.pathsep}{text_file}"}
    lines = in_terminal(list(commands.values()), request.param, folder, **stand_in)
    return request.param, dict(zip(commands, lines, strict=True))


def bars(lines: list[str]) -> list[re.Match[str]]:
    return [match for line in lines if "━━━━" in line and "┏" not in line and (match := BAR.match(line))]


def test_every_command_ends_well(captures):
    for name, lines in captures[1].items():
        assert lines, name
        assert not [line for line in lines if "error:" in line or "failed" in line], (name, lines[-5:])


def test_no_line_is_longer_than_the_terminal(captures):
    columns, seen = captures
    for name, lines in seen.items():
        # Commands to be copied stay in one piece.
        long = [line for line in lines if len(line) > columns and not line.startswith("  slimgpt ")]
        assert not long, name


def test_nothing_of_other_libraries_is_seen(captures):
    for name, lines in captures[1].items():
        assert not [line for line in lines for leak in LEAKS if leak in line], name


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        ("prune", {"measuring", "pruning", "generating", "teacher", "training", "comparing"}),
        ("prune --export", {"pruning", "comparing", "writing"}),
        ("recover", {"reading", "teacher", "training"}),
        ("compare", {"text.txt, window 64", "samples", "timing"}),
        ("evaluate", {"windows"}),
        ("export", {"writing"}),
        ("verify", {"comparing"}),
        ("speed", {"timing"}),
        (
            "demo",
            {"writing text", "measuring", "pruning", "comparing", "dense model", "slim model", "timing", "memory"},
        ),
    ],
)
def test_bars_have_a_phase_a_count_and_the_time_left(captures, command, phases):
    columns, seen = captures
    lines = seen[command]
    if (command, columns) == ("compare", 120):
        phases = phases - {"timing"}
    drawn = [line for line in lines if re.search(r"[━╸╺]{10}", line) and not re.search(r"[┏┡└│]", line)]
    matches = bars(lines)
    assert len(matches) == len(drawn), [line for line in drawn if not BAR.match(line)]
    assert {match["phase"].strip() for match in matches} == phases
    for phase in phases:
        last = [match for match in matches if match["phase"].strip() == phase][-1]
        done, total = last["count"].split()[-1].split("/")
        assert done == total
        assert last["time"].startswith("in "), last[0]
