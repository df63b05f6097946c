"""Every script in `examples` runs, in a fresh process as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.models.families import tiny_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer) -> Path:
    """Tiny models with contexts that are long enough for the examples."""
    root = tmp_path_factory.mktemp("examples")
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    for name, family, sizes in (("dense", "llama", {}), ("mixture", "qwen3_moe", mixture)):
        tiny_model(family, max_position_embeddings=512, **sizes).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def long_text(tmp_path_factory, text_file) -> Path:
    file = tmp_path_factory.mktemp("long") / "text.txt"
    lines = text_file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(" ".join(lines[i::7]) for i in range(7)) * 6, encoding="utf-8")
    return file


MARK = "=== script"

DRIVER = f"""
import json, runpy, sys
for script, *words in json.loads(sys.argv[1]):
    print("{MARK}")
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
"""


def run(*scripts: tuple[object, ...]) -> list[str]:
    """What scripts print that run one after the other, each with its arguments: to import torch takes longer."""
    words = [[str(ROOT / "examples" / str(name)), *map(str, arguments)] for name, *arguments in scripts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", DRIVER, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(MARK)[1:]


@pytest.mark.network
def test_prune_and_generate(folders, tmp_path):
    assert "removed" in run(("prune_and_generate.py", folders / "dense", tmp_path / "slim"))[0]
    assert (tmp_path / "slim/model.safetensors").is_file()


def test_own_text_equal_layers_and_a_mixture(folders, long_text, text_file, tmp_path):
    own, equal, mixture = run(
        ("own_text.py", folders / "dense", tmp_path / "own", long_text, text_file),
        ("equal_layers_for_vllm.py", folders / "dense", tmp_path / "equal", long_text),
        ("mixture_of_experts.py", folders / "mixture", tmp_path / "mixture", long_text),
    )
    assert "nats per token" in own
    assert "vllm serve" in equal
    assert not (tmp_path / "equal/modeling_slim.py").exists()
    assert "layer 1: experts" in mixture


@pytest.mark.slow
def test_training(folders, long_text, tmp_path):
    slim = tmp_path / "slim"
    _, trained = run(
        ("own_text.py", folders / "dense", slim, long_text, long_text),
        ("train_afterwards.py", folders / "dense", slim, tmp_path / "better", long_text),
    )
    assert "slim" in trained


@pytest.mark.slow
def test_search(folders, long_text, tmp_path):
    text = run("search_widths.py", folders / "dense", tmp_path / "slim", long_text)
    assert "parameters will be left" in text
    assert (tmp_path / "slim/model.safetensors").is_file()


def test_the_notebook_runs(folders, long_text, tmp_path, monkeypatch):
    """Every cell, in a kernel of its own, with a tiny model and text in place of the demo's."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples/prune_and_look.ipynb", as_version=4)
    nbformat.validate(notebook)
    settings = notebook.cells[1]
    assert settings.source.startswith('MODEL = "demo"')
    settings.source = (
        f"MODEL = {str(folders / 'dense')!r}\nCALIBRATION = TEXT = {str(long_text)!r}\nNUM_SAMPLES, SEQ_LEN = 16, 64"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data for output in outputs if "data" in output]
    assert any("<table" in data.get("text/html", "") for data in shown)  # the report
    assert any("image/png" in data for data in shown)  # its plot
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "nats per token" in printed
    assert (tmp_path / "slim/model.safetensors").is_file()
    assert not any(output.output_type == "error" for output in outputs)


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads((ROOT / "examples/prune_and_look.ipynb").read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def test_no_example_is_long_or_forgotten():
    named = (ROOT / "tests/test_examples.py").read_text(encoding="utf-8")
    assert all(f'"{name}"' in named for name in SCRIPTS)
    assert all(10 <= len((ROOT / "examples" / name).read_text().splitlines()) <= 30 for name in SCRIPTS)


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_yaml(file):
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert values["name"]
    for job in values.get("jobs", {}).values():
        assert job["steps"]
