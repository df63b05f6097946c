"""The commands on a card are ones that the command line takes, with the settings that were used."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import typer

import slimgpt
from slimgpt.checkpoint.commands import commands
from slimgpt.cli import app
from slimgpt.pruning.report import PruneReport
from slimgpt.recovery.config import RecoverConfig


def parsed(command: str) -> dict:
    """What the command line makes of a command."""
    name, *words = shlex.split(command.replace("\\\n", " "))[1:]
    below = typer.main.get_command(app).commands[name]
    return below.make_context(name, words).params


@pytest.fixture(scope="module")
def recovered(dense_folder, text_file, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    slimgpt.prune_folder(str(dense_folder), root / "slim", ratio=0.3, calibration=str(text_file), num_samples=8,
                         seq_len=24, device="cpu")  # fmt: skip
    common = {"max_length": 24, "batch_size": 8, "max_steps": 2, "device": "cpu", "evaluations": 1}
    slimgpt.recover(root / "slim", root / "first", str(text_file), method="lora", rank=2, alpha=3.0, dropout=0.25,
                    pack=True, bf16=False, warmup=0.125, **common)  # fmt: skip
    slimgpt.recover(root / "first", root / "second", [str(text_file)] * 2, teacher=str(dense_folder),
                    method="distill", layer_weight=0.5, shares=(3, 1),
                    gradient_checkpointing=True, **common)  # fmt: skip
    return root / "second"


def test_every_command_is_one_that_can_be_given(recovered, dense_folder, text_file):
    report = PruneReport.from_json(json.loads((recovered / "slimgpt.json").read_text()))
    prune, first, second = commands(report)
    pruning = parsed(prune)
    assert (pruning["model"], pruning["ratio"], pruning["num_samples"]) == (dense_folder.name, 0.3, 8)
    for command, run in zip((first, second), report.recovery):
        options, settings = parsed(command), run["settings"]
        for field in fields(RecoverConfig):
            expected, used = settings[field.name], options[field.name]
            if field.name == "shares":
                expected = expected and ",".join(f"{share:g}" for share in expected)
            assert used == expected, field.name
        assert Path(options["data"][0]).name == text_file.name
        RecoverConfig(**{name: settings[name] for name in asdict(RecoverConfig()) if name != "shares"})
    assert parsed(second)["teacher"] == dense_folder.name
    card = (recovered / "README.md").read_text()
    for command in (prune, first, second):
        assert command in card
        assert str(recovered.parent) not in command
