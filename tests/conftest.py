"""Folders and texts that many tests need."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Under pytest-xdist every worker, and every process it starts, takes one thread: more would fight for the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import slimgpt
from slimgpt.io.notebook_figure import NotebookFigure
from tests.models.families import VOCABULARY, tiny_model

SENTENCES = [
    "The river runs past the old mill and on to the sea.",
    "A small model that answers at once is worth more than a large one that does not.",
    "She counted the heads, the channels and the layers, and wrote them down.",
    "Nothing is removed that the rest cannot make up for.",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--only llama,phi/qk-norm``: of the tests of families, those of these."""
    parser.addoption("--only", default="", help="names from tests/models/families.py, with commas between them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out families that ``--only`` does not name; skip what needs a network if ``SLIMGPT_OFFLINE`` is 1."""
    if os.environ.get("SLIMGPT_OFFLINE") == "1":
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="SLIMGPT_OFFLINE=1: no PyPI"))
    if only := set(filter(None, config.getoption("--only").split(","))):
        items[:] = [
            item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("name") in only
        ]


def pytest_collection_finish(session: pytest.Session) -> None:  # noqa: ARG001
    """Leave what the imports made out of every later collection of garbage: it is most of the heap, and stays."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With few workers, let one run all tests of a file: what a file makes for its tests is made once."""
    from xdist.scheduler import LoadFileScheduling

    few = len(config.getoption("tx") or []) <= 4 and config.getoption("dist") == "load"
    return LoadFileScheduling(config, log) if few else None


def _save_without_axes(figure: NotebookFigure, file: Any, **options: Any) -> None:
    """The picture of a model folder without ticks and labels, which take longer than the rest of a tiny run."""
    if Path(str(file)).name in ("widths.png", "recovery.png"):
        figure.set_layout_engine("none")
        for axes in figure.axes:
            axes.set_axis_off()
        options["dpi"] = 20
    Figure.savefig(figure, file, **options)


@pytest.fixture(scope="session", autouse=True)
def pictures_without_axes() -> Iterator[None]:
    """Saves a third of the time of every tiny run; see :func:`whole_pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NotebookFigure, "savefig", _save_without_axes)
        yield


@pytest.fixture
def whole_pictures(monkeypatch) -> None:
    """Pictures in model folders as users get them."""
    monkeypatch.setattr(NotebookFigure, "savefig", Figure.savefig)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on a few sentences, with an end token and no start token."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<unk>", "<end>", "<start>"])
    inner.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="session")
def starting(tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer with a start token before every text."""
    changed = copy.deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 2)]
    )
    return changed


@pytest.fixture
def registry() -> Iterator[dict[str, slimgpt.Architecture]]:
    """The table of families, which a test may change."""
    before = dict(slimgpt.ARCHITECTURES)
    yield slimgpt.ARCHITECTURES
    slimgpt.ARCHITECTURES.clear()
    slimgpt.ARCHITECTURES.update(before)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory, tokenizer) -> Path:
    """A tiny Llama with its tokenizer, as transformers saves it."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Text of a few thousand tokens, in an order that does not repeat."""
    generator = torch.Generator().manual_seed(0)
    words = " ".join(SENTENCES).split()
    order = torch.randint(len(words), (2000,), generator=generator).tolist()
    lines = [" ".join(words[i] for i in order[start : start + 12]) for start in range(0, len(order), 12)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file
