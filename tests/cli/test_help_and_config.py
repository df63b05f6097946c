"""Help that fits 80 columns, options from a file, and refusals before anything heavy is imported."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from slimgpt.cli import app
from slimgpt.config import METHODS
from slimgpt.solver import CRITERIA


def commands(command, words=()):
    """The words of every command, groups left out."""
    below = getattr(command, "commands", None)
    if below is None:
        return [words]
    return [each for name, other in below.items() for each in commands(other, (*words, name))]


COMMANDS = commands(typer.main.get_command(app))


def run(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], **options)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_fits_eighty_columns(words):
    result = run(*words, "-h", env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "--quiet" in result.output
    assert "--config" in result.output
    assert "…" not in result.output


def test_help_has_panels_and_examples():
    text = run("prune", "--help").output
    panels = ["Target", "Calibration", "Method", "Training", "Resources", "Output"]
    places = [text.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)
    assert text.index("Examples:") > places[-1]
    for panel in ("Data", "Method", "Training", "Distillation", "Resources", "Output"):
        assert f"─ {panel} ─" in run("recover", "--help").output


def test_methods_are_those_of_the_solver():
    assert list(METHODS) == list(CRITERIA)


def test_options_from_a_file(dense_folder, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("ratio = 0.3\nuniform = true\nnum-samples = 8\nseq_len = 24\n")
    planned = json.loads(run("plan", dense_folder, "--config", file, "--json").output)
    assert planned["plan"]["ratio"] == pytest.approx(0.3)
    assert planned["tokens"] == 8 * 24
    assert len({json.dumps(layer) for layer in planned["plan"]["layers"]}) == 1
    other = json.loads(run("plan", dense_folder, "--config", file, "--ratio", 0.1, "--json").output)
    assert other["plan"]["ratio"] == pytest.approx(0.1)  # what is typed wins


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratoi = 0.2", "names ratoi, which is no option of slimgpt plan; did you mean ratio?"),
        ("[prune]\nratio = 0.2", "names prune, which is no option of"),
        ("[ratio]\nvalue = 0.2", "has a table [ratio]; write options as lines"),
        ("ratio = ", "is no TOML file that can be read"),
        ("help = true", "names help, which is no option"),
        ("ratio = 'much'", "Invalid value for '--ratio'"),
    ],
)
def test_files_of_options_are_checked(text, message, dense_folder, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text(text)
    result = run("plan", dense_folder, "--config", file, prog_name="slimgpt", env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    missing = run("plan", dense_folder, "--config", tmp_path / "none.toml")
    assert missing.exit_code == 2


def test_repeated_options_from_a_file(dense_folder, text_file, tmp_path):
    (tmp_path / "options.toml").write_text(f"data = '{text_file}'\nmax-steps = 1\nshares = [1, 2]\n")
    result = run("recover", dense_folder, tmp_path / "out", "--config", tmp_path / "options.toml", "--max-length", 24)
    assert result.exit_code == 2
    assert "shares (1.0, 2.0) must be 1 numbers above 0" in " ".join((result.output + result.stderr).split())


def test_a_dry_run_writes_nothing(dense_folder, text_file, tmp_path):
    small = ["--calibration", text_file, "--num-samples", 8, "--seq-len", 24, "--device", "cpu", "--ratio", 0.3]
    result = run("prune", dense_folder, tmp_path / "slim", *small, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "plan: remove 29.96%" in result.output
    assert "on this CPU for 8 x 24 tokens" in result.output
    assert list(tmp_path.iterdir()) == []


def test_quiet_prints_errors_only(dense_folder, text_file, tmp_path):
    small = ["--calibration", text_file, "--num-samples", 8, "--seq-len", 24, "--device", "cpu", "--ratio", 0.3]
    result = run("prune", dense_folder, tmp_path / "slim", *small, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    again = run("prune", dense_folder, tmp_path / "slim", *small, "-q")
    assert again.exit_code == 2
    assert "exists" in again.stderr
    assert again.stdout == ""


def test_a_row_per_layer_only_when_asked_for(dense_folder, text_file, tmp_path):
    small = ["--calibration", text_file, "--num-samples", 8, "--seq-len", 24, "--device", "cpu", "--ratio", 0.3]
    for name, options in (("short", []), ("long", ["-v"])):
        text = run("prune", dense_folder, tmp_path / name, *small, *options).output
        assert ("┃ layer ┃" in text) == (name == "long")
        assert text.index("removed 2") < text.index("how far from the dense model") < text.index("next:")
