"""Wrong values are refused before torch is imported, and are named as they were typed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from slimgpt.cli import early_checks
from slimgpt.cli.early_checks import as_typed
from slimgpt.evaluation.llama_cpp import ENGINES
from slimgpt.evaluation.perplexity import BOS
from slimgpt.evaluation.samples import QUESTIONS
from slimgpt.exporting.engine_process import INSTALL
from slimgpt.exporting.run import FORMATS
from slimgpt.planning import HEAD_UNITS, RATIOS
from slimgpt.planning.engines import PROFILES
from slimgpt.runtime import setting_checks

BLOCKED = """
import contextlib, io, json, sys
class Late(BaseException): pass
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise Late(name)
sys.meta_path.insert(0, Finder())
from slimgpt.cli import app
results = []
for words in json.loads(sys.argv[1]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            app(words)
        except SystemExit as leave:
            code = leave.code
        except Late:
            code = "late"
    results.append([code, output.getvalue()])
print(json.dumps(results))
"""
"""Many commands in one process that cannot import torch."""

RATIO = "is outside (0, 1): it is the share of the decoder layers to remove; did you mean 0.2?"

CASES = [
    ("prune demo OUT --ratio 20", f"error: --ratio 20 {RATIO}"),
    ("demo OUT --ratio 20", f"error: --ratio 20 {RATIO}"),
    ("plan demo --for vllm --ratio 20", f"error: --ratio 20 {RATIO}"),
    ("scan demo --points 0.1,20", f"error: --points: ratio 20 {RATIO}"),
    ("prune demo OUT --method best", "error: --method 'best' is unknown; choose slimgpt, paper"),
    ("prune demo OUT --params many", "error: 'many' is no number of parameters"),
    ("prune demo OUT --num-samples 0", "error: --num-samples is 0; it must be at least 1"),
    ("prune demo OUT --schedule cosine", "error: --schedule 'cosine' is unknown; choose log_increase"),
    ("prune demo OUT --head-unit both", "error: --head-unit 'both' is unknown; choose auto, kv, query"),
    ("prune demo OUT --forward-dtype int3", "error: --forward-dtype 'int3' is unknown"),
    ("prune demo OUT --for tensorrt", "error: engine 'tensorrt' is unknown; choose hf, vllm"),
    ("prune demo OUT --export gguff", "error: --export 'gguff' is unknown; choose gguf, hf-uniform"),
    ("prune demo OUT --plan none.toml", "error: --plan 'none.toml' is no file"),
    ("prune demo OUT --memory much", "error: 'much' is no amount of memory"),
    ("prune demo OUT --batch 8", "error: --batch says how a speedup is timed, and none is asked for; add --speedup"),
    ("prune demo OUT --ratio 0.2 --params 1B", "error: --ratio and --params were given;"),
    ("prune ./none OUT", "error: no such folder: none"),
    ("plan none.gguf", "error: no such GGUF file: none.gguf"),
    ("recover none OUT --data demo", "error: no such folder: none"),
    ("recover . OUT --data demo --rank 0", "error: --rank is 0; it must be at least 1"),
    ("recover . OUT --data demo --batch-size 9", "error: --batch-size 9 is no multiple of --micro-batch 4"),
    ("evaluate demo", "error: nothing to evaluate: give --text, --tasks or --passkey"),
    ("evaluate demo --text demo --window 1", "error: --window 1 is too small"),
    ("evaluate demo --text demo --bos never", "error: --bos 'never' is unknown; choose auto, once, window"),
    ("evaluate demo --text demo --engine vllm", "error: --engine 'vllm' is unknown; choose auto, transformers"),
    ("evaluate demo --passkey some", "error: --passkey 'some' is no list of whole numbers above zero"),
    ("compare demo slim --samples 9", "error: --samples is 9; it must be from 0 to 4"),
    ("compare demo slim --window 128,x", "error: --window '128,x' is no list of whole numbers above zero"),
    ("compare demo ours=./none,slim", "error: no such folder: none"),
    ("speed demo --device gpu", "error: --device 'gpu' cannot be used here; choose auto, cpu, cuda"),
    ("speed demo --rounds 0", "error: --rounds is 0; it must be at least 1"),
    ("generate demo hello --dtype int3", "error: --dtype 'int3' is unknown"),
    ("chat ./none", "error: no such folder: none"),
    ("export . OUT --to ollama", "error: --to 'ollama' is unknown; choose gguf"),
    ("verify . --engine tensorrt", "error: --engine 'tensorrt' is unknown; choose transformers, vllm"),
    ("reproduce llama-7b --device gpu", "error: --device 'gpu' cannot be used here"),
]


def test_wrong_values_are_refused_before_torch_is_imported(tmp_path):
    words = json.dumps([command.split() for command, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    results = json.loads(done.stdout)
    wrong = [
        (command, code, output)
        for (command, message), (code, output) in zip(CASES, results, strict=True)
        if code != 2 or not output.startswith(message)
    ]
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def test_names_are_those_of_what_imports_torch():
    assert tuple(PROFILES) == early_checks.SERVERS
    assert tuple(FORMATS) == early_checks.FORMATS
    assert tuple(INSTALL) == early_checks.RUNNERS
    assert len(QUESTIONS) == early_checks.MOST_SAMPLES
    assert tuple(RATIOS) == setting_checks.SCHEDULES
    assert HEAD_UNITS == setting_checks.HEAD_UNITS
    assert BOS == early_checks.BOS
    assert ENGINES == early_checks.EVALUATORS


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("num_samples is 0; it must be at least 1", "--num-samples is 0; it must be at least 1"),
        ("speedup and kv_cache both decide", "--speedup and --kv-cache both decide"),
        ("names none; add ratio, kv_cache or uniform", "names none; add --ratio, --kv-cache or --uniform"),
        # What only looks like a setting.
        ("calibration tokens are few", "calibration tokens are few"),
        ("hidden_size is 3", "hidden_size is 3"),
        ("no such folder: a/kv_cache", "no such folder: a/kv_cache"),
        ("'kv_cache' is no model", "'kv_cache' is no model"),
        ("leave out one of the two", "leave out one of the two"),
        ("the ratio is met", "the ratio is met"),
    ],
)
def test_settings_are_named_as_they_are_typed(message, typed):
    names = ("num_samples", "speedup", "kv_cache", "ratio", "uniform", "calibration")
    assert as_typed(message, {name: f"--{name.replace('_', '-')}" for name in names}) == typed
