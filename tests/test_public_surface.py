"""The names that others rely on: what `slimgpt` exports, the options of its commands, the keys of its JSON files.

`public_surface.json` lists them. A change of it is a change for users: make it on purpose, with

    python tests/test_public_surface.py --write
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from difflib import unified_diff
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # As pytest would have it: `tests` as a package, and the package of this checkout.
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "src")]

import pytest
import torch
import typer
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from tests.golden import save_dense, tiny_mixture, tiny_model, words

LISTED = Path(__file__).with_name("public_surface.json")

FUNCTIONS = (
    "prune", "prune_folder", "recover", "compare", "export", "verify", "evaluate", "evaluate_tasks", "load", "save",
    "inspect", "scan",
)  # fmt: skip

NAMED_BY_DATA = ("leaks", "scores", "omitted")
"""Keys of objects whose own keys are no field names but texts or tasks."""

ROWS = {"question": "is the mill old", "answer": True, "passage": "The river runs past the old mill."}


# Names in Python


def keywords(function: Any) -> list[str]:
    """The parameters of a function in order, with their defaults; behind `*` they are given by name."""
    signature: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in signature:
            signature.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        signature.append(f"{star}{parameter.name}{default}")
    return signature


def recovery_settings() -> list[str]:
    """The settings that `slimgpt.recover` takes beside its own keywords, as it lists them when it refuses another."""
    with pytest.raises(slimgpt.SlimGPTError) as refused:
        slimgpt.recover("slim", "out", "text", no_such_setting=1)
    return str(refused.value).partition("it has ")[2].split(", ")


# The command line


def commands(command: Any, name: str = "slimgpt") -> dict[str, list[str]]:
    """The arguments and options of a command and of those below it, with defaults."""
    options = {name: [said_of(parameter) for parameter in command.params]}
    for below, other in getattr(command, "commands", {}).items():
        options |= commands(other, f"{name} {below}")
    return options


def said_of(parameter: Any) -> str:
    """One argument or option: its names, whether it is a flag or may be repeated, and its default."""
    if parameter.param_type_name == "argument":
        text = parameter.metavar or parameter.name.upper()
        return text if parameter.required else f"[{text}]"
    text = "/".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return f"{text} (flag)"
    text += " (repeated)" if parameter.multiple else ""
    return text if parameter.default is None else f"{text} = {parameter.default}"


# The JSON files


def keys(values: Any, where: str = "") -> Iterator[str]:
    """The paths of all keys; places in lists are `[]`, and keys that are data (numbers, texts, tasks) are `*`."""
    if isinstance(values, dict):
        given = where.rpartition(".")[2] in NAMED_BY_DATA
        for key, value in values.items():
            place = f"{where}.{'*' if given or key.isdigit() else key}".lstrip(".")
            yield place
            yield from keys(value, place)
    elif isinstance(values, list):
        for value in values:
            yield from keys(value, f"{where}[]")


def keys_of(*files: Path) -> list[str]:
    """The paths of all keys that one of some files has."""
    return sorted({path for file in files for path in keys(json.loads(file.read_text(encoding="utf-8")))})


def call(*given: object) -> None:
    """Run a command."""
    done = CliRunner().invoke(app, [str(word) for word in given])
    assert done.exit_code == 0, done.output


def files() -> dict[str, list[str]]:
    """The keys of what tiny runs write into the current folder, with all that they can measure."""
    save_dense(tiny_model(), Path("dense"))
    save_dense(tiny_mixture(), Path("mixture"))
    Path("text.txt").write_text(words(2000), encoding="utf-8")
    Path("rows/boolq").mkdir(parents=True)
    rows = [{**ROWS, "answer": number % 2 == 0} for number in range(3)]
    Path("rows/boolq/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"ratio": 0.3, "calibration": "text.txt", "seq_len": 48, "device": "cpu"}
    slimgpt.prune_folder("dense", "slim", allocation="search", distill=500, num_samples=24, **options)
    slimgpt.prune_folder("mixture", "slim-mixture", whole_experts=0.5, num_samples=12, **options)
    slimgpt.recover(
        "slim", "recovered", "text.txt", teacher="dense", method="distill", layer_weight=1.0, max_steps=2,
        max_length=24, batch_size=8, device="cpu", bf16=False, evaluations=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # a process of its own for each model
        patch.setattr("slimgpt.comparison.timing.peak_memory", lambda *_, **__: 1)
        call(
        "compare", "dense", "slim", "--out", "compared", "--text", "text.txt", "--window", 32, "--max-tokens", 256,
        "--tasks", "boolq", "--data-dir", "rows", "--long", 64, "--passkey", 200, "--prompt", 8, "--new-tokens", 2,
        "--rounds", 1, "--device", "cpu",
        )  # fmt: skip
    call(
        "evaluate", "slim", "--against", "dense", "--text", "text.txt", "--window", 32, "--max-tokens", 256,
        "--json", "evaluate.json", "--device", "cpu",
    )  # fmt: skip
    call(
        "scan", "dense", "--calibration", "text.txt", "--points", "0.1,0.3", "--num-samples", 24, "--seq-len", 48,
        "--allocation", "sensitivity", "--distill", 500, "--out", "scanned", "--device", "cpu",
    )  # fmt: skip
    return {
        "slimgpt.json": keys_of(*(Path(name, "slimgpt.json") for name in ("slim", "slim-mixture", "recovered"))),
        "recovery.json": keys_of(Path("recovered/recovery.json")),
        "compare.json": keys_of(Path("compared/compare.json")),
        "evaluate.json": keys_of(Path("evaluate.json")),
        "scan.json": keys_of(Path("scanned/scan.json")),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread here and in the processes started here: for models this small, two mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            yield
    finally:
        torch.set_num_threads(threads)


def surface(folder: Path) -> dict[str, Any]:
    """All that is listed, found by looking; runs are made in a folder."""
    with chdir(folder), one_thread():
        return {
            "names": sorted(slimgpt.__all__),
            "keywords": {name: keywords(getattr(slimgpt, name)) for name in FUNCTIONS},
            "settings of recover": recovery_settings(),
            "commands": commands(typer.main.get_command(app)),
            "files": files(),
        }


def lines(values: dict[str, Any] | list[str], where: str = "") -> Iterator[str]:
    """What is listed, a line each."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from lines(value, f"{where}{key}: ")
    else:
        yield from (f"{where}{value}" for value in values)


def test_the_public_surface_is_the_one_that_is_listed(tmp_path):
    listed, current = json.loads(LISTED.read_text(encoding="utf-8")), surface(tmp_path)
    changes = list(unified_diff(list(lines(listed)), list(lines(current)), "listed", "found", lineterm="", n=0))
    advice = "if this is meant, run python tests/test_public_surface.py --write"
    assert not changes, "\n".join([f"the public surface changed; {advice}", *changes])


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as root:
        LISTED.write_text(json.dumps(surface(Path(root)), indent=1) + "\n", encoding="utf-8")
    print(f"written: {LISTED}")
