"""What README and guides show is run as it stands there, on a tiny model: commands of the quick start, and Python."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from tests.cli.test_generate import TEMPLATE
from tests.models.families import tiny_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "--num-samples 32 --seq-len 512": "--num-samples 8 --seq-len 64",
    "num_samples=32, seq_len=512": "num_samples=8, seq_len=64",
    '"demo"': '"MODEL"',
    "window=512": "window=64",
    'scan("MODEL"': 'scan("MODEL", num_samples=8, seq_len=64',
}
"""What is made smaller in a snippet."""


def blocks(page: str, language: str) -> list[str]:
    """The blocks of code of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def smaller(snippet: str) -> str:
    for long, short in SMALL.items():
        snippet = snippet.replace(long, short)
    return snippet


@pytest.fixture(scope="module")
def work(tokenizer, text_file, tmp_path_factory) -> Path:
    """A folder with a dense model, a slim one, and text, by the names that the guides give them."""
    root = tmp_path_factory.mktemp("snippets")
    tiny_model("llama", max_position_embeddings=1024).save_pretrained(root / "MODEL")
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    chatting.save_pretrained(root / "MODEL")
    (root / "BASE").symlink_to(root / "MODEL")
    (root / "my.txt").write_text(text_file.read_text())
    rows = [{"text": line} for line in text_file.read_text().splitlines()]
    (root / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def test_the_quick_start_leads_to_a_chat_in_three_commands(work, monkeypatch):
    monkeypatch.chdir(work)
    install, prune, chat = blocks("docs/quick-start.md", "")[0].splitlines()
    assert install == "pip install torch && pip install -e ."
    for line, typed in ((prune, None), (chat, "The river\n\n")):
        words = shlex.split(smaller(line).replace(" demo ", " MODEL "))
        assert words[0] == "slimgpt"
        done = CliRunner().invoke(app, words[1:], input=typed)
        assert done.exit_code == 0, done.output
    assert done.output.strip()
    assert (work / "slim/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("page", "number"),
    [
        ("README.md", 0),
        ("docs/guides/serving.md", 0),
        ("docs/guides/checkpoints.md", 0),
        ("docs/guides/evaluation.md", 0),
        ("docs/guides/how-much.md", 0),
    ],
)
def test_python_of_a_page_runs(page, number, work, monkeypatch):
    monkeypatch.chdir(work)
    names = {"slimgpt": slimgpt, "AutoModelForCausalLM": AutoModelForCausalLM}
    model, tokenizer = slimgpt.load("MODEL")
    names |= {"model": model, "tokenizer": tokenizer}
    snippet = smaller(blocks(page, "python")[number])
    if page == "README.md":
        snippet = snippet.replace('"slim"', '"from_python"')
    if page.endswith("checkpoints.md"):  # its second line is about a model of equal layers
        snippet = "\n".join(line for line in snippet.splitlines() if "--uniform" not in line)
    exec(compile(snippet, page, "exec"), names)
    if page == "README.md":
        assert (work / "from_python/model.safetensors").is_file()
