"""A folder of texts as `benchmarks/quality.py` wants it, with tiny texts in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import SENTENCES


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """C4, WikiText-2 and Alpaca in their files' forms: the same words in random order."""
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    words = " ".join(SENTENCES).split()

    def text(count: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (count,), generator=generator).tolist())

    for name in ("c4", "wikitext2", "alpaca"):
        (folder / name).mkdir()
    c4 = [json.dumps({"text": f"{number} {text(12)}"}) for number in range(1000)]
    (folder / "c4/c4_train_shard0_first1000.jsonl").write_text("\n".join(c4) + "\n", encoding="utf-8")
    articles = "".join(
        f" = Article {number} = \n\n {text(60)} \n = = Part = = \n {text(40)} \n" for number in range(30)
    )
    (folder / "wikitext2/wiki.train.raw.first1MB.txt").write_text(articles, encoding="utf-8")
    (folder / "wikitext2/wiki.test.raw").write_text(text(500), encoding="utf-8")
    rows = [{"instruction": text(5), "input": text(3) if number % 2 else "", "output": text(9)} for number in range(50)]
    (folder / "alpaca/alpaca_data_cleaned.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
