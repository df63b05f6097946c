"""Readers of files that other people's programs wrote: whatever is in one, a command succeeds or says one line, and
leaves nothing that looks finished."""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import shutil
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import save_torch_state_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import SlimGPTError
from slimgpt.evaluation import read_text
from slimgpt.models.loading import load_config
from slimgpt.models.source import locate
from slimgpt.recovery.dataset import collect
from tests.models.families import tiny_model, windows
from tests.models.remote_code import remote_folder

FILES = (
    "config.json",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer_config.json",
    "slimgpt.json",
)
EXAMPLES = int(os.environ.get("SLIMGPT_FUZZ_EXAMPLES", "60"))
"""Of every file; each takes about half a second."""


fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


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
    """Run a command, whose only endings are success and exit code 2 with a message; its exit code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exit_code not in (0, 2):
        raise result.exception or AssertionError(result.output)
    assert "Traceback" not in result.output
    assert result.exit_code == 0 or "error:" in result.output
    return result.exit_code


def try_all(folder):
    """Give a folder to everything that reads its JSON."""
    name = str(folder)
    plan = lambda: slimgpt.make_plan(load_config(locate(name)), ratio=0.3)  # noqa: E731
    for read in (lambda: slimgpt.inspect(name), lambda: slimgpt.load(name), plan):
        with contextlib.suppress(SlimGPTError):
            read()
    command("inspect", folder)
    command("plan", folder, "--ratio", 0.3)


def with_changes(file, check):
    """Call a check with a JSON file changed in many ways."""

    @fuzz
    @given(mutated(file.read_text(encoding="utf-8")))
    def changed(data):
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check()

    changed()


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_changed_json_is_read_or_refused(file, slim_folder, tmp_path):
    folder = shutil.copytree(slim_folder, tmp_path / "slim")
    with_changes(folder / file, lambda: try_all(folder))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("model_type", ["baichuan", "internlm2"])
def test_changed_json_is_converted_or_refused(model_type, file, tokenizer, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out"
    remote_folder(folder, tokenizer)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}), encoding="utf-8")
    if model_type == "internlm2":  # whose matrix has the same shape, without biases
        tensors = load_file(folder / "model.safetensors")
        renamed = {name.replace("self_attn.W_pack", "attention.wqkv"): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(
            json.dumps(
                {**config, "model_type": model_type, "bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
            )
        )
    assert command("convert", folder, out) == 0
    shutil.rmtree(out)

    def check():
        code = command("convert", folder, out)
        assert code == 0 or not out.exists()
        shutil.rmtree(out, ignore_errors=True)

    with_changes(folder / file, check)


BYTES = st.sampled_from(
    [b"", b"\x00", b"\xff", b"\xed\xa0\x80", b'"', b"{", b"]", b"\n", b"\r", b"9" * 40, b"null", b"\xff" * 8]
)


@st.composite
def damaged(draw, data, head=None):
    """Bytes with one to four places overwritten, cut out, doubled or cut off, most of them near the beginning."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), head or len(data))))
        kind = draw(st.sampled_from(["write", "insert", "drop", "double", "cut"]))
        inserted = draw(BYTES | st.binary(max_size=8))
        length = draw(st.integers(0, 40))
        if kind == "write":
            data = data[:at] + inserted + data[at + len(inserted) :]
        elif kind == "insert":
            data = data[:at] + inserted + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + length :]
        elif kind == "double":
            data = data[: at + length] + data[at:]
        else:
            data = data[:at]
    return data


ROWS = [
    {"text": "The river runs past the old mill and on to the sea. " * 40},
    {"messages": [{"role": "user", "content": "heads"}, {"role": "assistant", "content": "and channels"}]},
    {"conversations": [{"from": "human", "value": "heads"}, {"from": "gpt", "value": "and channels"}]},
    {"instruction": "count the layers", "output": "and write them down"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "the mill"}]}]},
]


def parquet(rows):
    """Rows with a text as the bytes of a Parquet file."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [row["text"] for row in rows if "text" in row]}), out)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = {
    "a.txt": ROWS[0]["text"].encode(),
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.parquet": parquet(ROWS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_damaged_text_is_read_or_refused(name, slim_folder, tmp_path):
    folder = shutil.copytree(slim_folder, tmp_path / "slim")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}")
    tokenizer = slimgpt.load(str(folder))[1]
    file, out = tmp_path / name, tmp_path / "out"

    @fuzz
    @given(damaged(TEXTS[name]))
    def check(data):
        file.write_bytes(data)
        for read in (lambda: read_text(str(file)), lambda: collect(tokenizer, [str(file)], 16, 0)):
            with contextlib.suppress(SlimGPTError):
                read()
        words = ["prune", folder, out, "--ratio", 0.1, "--calibration", file, "--num-samples", 2, "--seq-len", 8]
        code = command(*words, "--device", "cpu", "--distill", "off", "--overwrite")
        assert code == 0 or not out.exists()
        shutil.rmtree(out, ignore_errors=True)
        assert not list(tmp_path.glob(".out*"))

    check()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["model.gguf", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"]
)
def test_damaged_weights_are_read_or_refused(name, dense_folder, tmp_path):
    """Their beginnings, where names, types and sizes are."""
    folder = shutil.copytree(dense_folder, tmp_path / "model")
    given_name = folder
    if name == "model.gguf":
        model = tiny_model("llama", mlp_bias=False, attention_bias=False)
        model.save_pretrained(folder)
        given_name = tmp_path / name
        slimgpt.export(folder, given_name, "gguf", quantize="F32", check=False)
    if name.startswith("adapter"):
        given_name = tmp_path / "adapter"
        model = get_peft_model(slimgpt.load(str(folder))[0], LoraConfig(r=2, target_modules=["q_proj"]))
        model.peft_config["default"].base_model_name_or_path = str(folder)
        model.save_pretrained(given_name)
    file = given_name / name if given_name.is_dir() else given_name
    whole = file.read_bytes()

    @fuzz
    @given(damaged(whole, head=8000))
    def check(data):
        file.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try_all(given_name)

    check()
