"""Figures of the README are those that the benchmarks wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")

METHODS = {
    "**`slimgpt`**, the default": "slimgpt",
    "`--allocation search`": "slimgpt-search",
    "OBS in equal layers (ZipLM, OSSCAR)": "obs-uniform",
    "SlimGPT, as published": "paper",
    "FLAP": "flap",
    "ShortGPT (whole layers)": "shortgpt",
    "LLM-Pruner": "llm-pruner",
}


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of the table below a heading, by the first of each row."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def perplexities(method: str, ratio: float) -> set[str]:
    """Both perplexities as the README writes them, of every time that they were measured without changes."""
    return {
        " / ".join(f"{entry['measures'][text]['value']:.1f}" for text in ("wikitext2@512", "c4@512"))
        for entry in result("quality")["rows"]
        if (entry["row"]["model"], entry["row"]["method"]) == ("smollm2", method)
        and entry["row"]["ratio"] == ratio
        and not entry["row"]["repair"]
        and not entry["row"]["changes"]
    }


def test_quality_is_what_was_measured():
    table = rows("How good")
    assert list(table)[1:] == list(METHODS)
    for name, cells in list(table.items())[1:]:
        for ratio, cell in zip((0.2, 0.33, 0.5), cells, strict=True):
            assert not cell or cell.replace("*", "") in perplexities(METHODS[name], ratio), (name, ratio)
    (dense,) = perplexities("dense", 0.0)
    assert f"(dense: {dense})" in README


def test_times_and_memory_are_what_was_measured_or_computed():
    table = rows("How fast")
    seconds = {
        method: next(
            entry["found"]["core_seconds"]
            for entry in result("quality")["rows"]
            if (entry["row"]["model"], entry["row"]["method"], entry["row"]["ratio"]) == ("smollm2", method, 0.2)
            and not entry["row"]["changes"]
        )
        for method in ("slimgpt", "paper")
    }
    small = table["SmolLM2-135M"]
    assert small[3:5] == [f"{-(-seconds['slimgpt'] // 60):.0f} min", f"{-(-seconds['paper'] // 60):.0f} min"]
    limited, paper, default = result("gpu")["results"]
    whole = table["LLaMA-7B's shape"]
    assert whole[3:5] == [f"{default['seconds']:.0f} s", f"{paper['seconds']:.0f} s"]
    peaks = [entry["peak_device_bytes"] / 1e9 for entry in (default, paper, limited)]
    assert whole[2] == f"{peaks[0]:.0f} GB, `paper` {peaks[1]:.0f} GB"
    assert table["the same, `--memory 8GB`"][2:5] == [f"{peaks[2]:.1f} GB", "", f"{limited['seconds']:.0f} s"]
    computed = (ROOT / "docs/guides/scaling.md").read_text(encoding="utf-8")
    for model, gpus in (("Llama-3.1-70B", 1), ("Llama-3.1-405B", 8)):
        lines = re.findall(rf"^\| {model} \| {gpus} \|(.*)\|$", computed, re.MULTILINE)
        time, memory = ([cell.strip() for cell in line.split("|")] for line in lines[:2])
        row, seconds = table[model], float(time[-1].replace(",", ""))
        assert row[3] == f"{seconds / 60:.0f} min"
        assert float(row[2].split()[0]) == round(float(memory[-1]))
        assert row[5] == "computed"
