"""Readers of JSON that other people's programs wrote: whatever is in a file, a command succeeds or says one line."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings

import pytest
from huggingface_hub import save_torch_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import SlimGPTError
from slimgpt.models.loading import load_config
from slimgpt.models.source import locate
from tests.models.families import windows

FILES = (
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer_config.json",
    "slimgpt.json",
)
EXAMPLES = 60
"""Of every file; each takes about half a second."""


def nested(depth):
    """A list within lists."""
    value = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 3, 7, 97, 10**6, 2**31, 2**63, 10**30]),
    st.floats(width=32),
    st.sampled_from(["", "auto", "float32", "llama", "\ud800", "../outside", "a/b", "\x00", "[red]", "9" * 300]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"0": {}}, ["a", 1]]),
    st.builds(nested, st.sampled_from([30, 100, 300])),
)
KINDS = st.sampled_from(["drop", "replace", "replace", "insert", "cut", "flip", "whole"])


def places(content, path=()):
    """The paths of all values in nested objects and lists, the longest lists by their first items only."""
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:4]) if isinstance(content, list) else ()
    )
    for key, value in content.items() if isinstance(content, dict) else items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, text):
    """The bytes of a JSON file with one to three changes."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(KINDS)
        if kind == "whole":
            return json.dumps(draw(VALUES)).encode()
        if kind in ("cut", "flip"):
            data = json.dumps(content).encode()
            at = draw(st.integers(0, len(data) - 1))
            return data[:at] if kind == "cut" else data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        paths = list(places(content))
        if not paths:
            break
        # Settings at the top come as often as all that is nested.
        top = [path for path in paths if len(path) == 1]
        *parents, key = draw(st.sampled_from(top) | st.sampled_from(paths))
        holder = content
        for parent in parents:
            holder = holder[parent]
        if kind == "drop":
            del holder[key]
        elif kind == "replace" or isinstance(holder, list):
            holder[key] = copy.deepcopy(draw(VALUES))
        else:
            name = draw(st.sampled_from(["quantization_config", "auto_map", "text_config", "rope_scaling", "x"]))
            holder[name] = copy.deepcopy(draw(VALUES))
    return json.dumps(content).encode()


@pytest.fixture(scope="module")
def slim_folder(dense_folder, tmp_path_factory):
    """A tiny slim folder in shards."""
    folder = tmp_path_factory.mktemp("fuzz") / "slim"
    model, tokenizer = slimgpt.load(str(dense_folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = slimgpt.prune(model, tokenizer, 0.3, windows(8, 24, seed=1), device="cpu")
    slimgpt.save(model, tokenizer, report, folder)
    save_torch_state_dict(load_file(folder / "model.safetensors"), folder, max_shard_size="60KB")
    return folder


def command(*words):
    """Run a command, whose only endings are success and exit code 2 with a message."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code not in (0, 2):
        raise result.exception or AssertionError(result.output)
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or "error:" in result.output


def try_all(folder):
    """Give a folder to everything that reads its JSON."""
    name = str(folder)
    plan = lambda: slimgpt.make_plan(load_config(locate(name)), ratio=0.3)  # noqa: E731
    for read in (lambda: slimgpt.inspect(name), lambda: slimgpt.load(name), plan):
        with contextlib.suppress(SlimGPTError):
            read()
    command("inspect", folder)
    command("plan", folder, "--ratio", 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_changed_json_is_read_or_refused(file, slim_folder, tmp_path):
    folder = shutil.copytree(slim_folder, tmp_path / "slim")
    text = (folder / file).read_text(encoding="utf-8")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(mutated(text))
    def check(data):
        (folder / file).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try_all(folder)

    check()
