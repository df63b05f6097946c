"""Writes benchmarks/results/families.md and .json: the table of families, and what the tests establish for each.

python benchmarks/families.py            # all families, several minutes
python benchmarks/families.py llama phi  # look at these again and keep the rest of benchmarks/results/families.json
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from slimgpt.models.families.support import Support, families  # noqa: E402
from tests.models.families import NAMES  # noqa: E402
from tests.models.mixtures import OWN_OF_MIXTURES  # noqa: E402

TOGETHER = 10
"""Families that are looked at together."""

RESULTS = ROOT / "benchmarks" / "results"
JSON, PAGE = RESULTS / "families.json", RESULTS / "families.md"
CHECKS = {
    "test_replaying_the_layers_is_the_models_own_forward": "replay",
    "test_slim_model_is_the_dense_one_with_pruned_columns_zeroed": "masked",
    "test_experts_one_by_one_are_the_modules_own_forward": "replay",
    "test_slim_model_is_the_dense_one_with_channels_zeroed_and_routers_masked": "masked",
    "test_folder_loads_without_slimgpt_to_the_bit": "reload",
}


TEXT = """
**In a stock class**: with `--uniform` this is removed so that a class of transformers loads the folder as it is. Layers
that differ, and the rest, load with `trust_remote_code=True`: a small modeling file travels in the folder.

Checks on tiny random models of the family's own classes, with biases and windows shorter than the text. *Replay*: the
layers run in parts are the model's own forward pass. *Masked*: the slim model equals the dense one with the removed
columns set to zero, to 1e-12 in fp64 and 1e-5 in fp32. *Reload*: a process without slimgpt loads the folder (layers
that differ; pruned twice; uniform) to the same bits and generates the same with and without a cache.

Mixtures of experts have tests of their own kind. *Replay*: experts run one by one add up to the module's own output,
to 1e-12 in fp64. *Masked*: the logits of removed experts are minus infinity in the dense model, and removed channels
zero; to 1e-6, because most routers compute in fp32 whatever the model's type.
"""


class Outcomes:
    """Notes the outcome of every check of every family while pytest runs."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[str]]] = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item, call):  # noqa: ARG002
        report = (yield).get_result()
        check = CHECKS.get(item.originalname)
        if check and (report.when == "call" or report.outcome != "passed"):
            name = item.callspec.params["name"]
            outcome = report.outcome if report.outcome != "skipped" else "no stock class"
            self.found.setdefault(name, {}).setdefault(check, []).append(outcome)


def outcome_cell(outcomes: list[str]) -> str:
    """A cell of the table."""
    if not outcomes:
        return "not run"
    failed = sum(outcome == "failed" for outcome in outcomes)
    return f"{failed} of {len(outcomes)} failed" if failed else f"{sum(o == 'passed' for o in outcomes)} passed"


def row(family: Support, outcomes: dict[str, dict[str, list[str]]]) -> str:
    """A line of the table of supported families."""
    mine = [checks for name, checks in outcomes.items() if name.partition("/")[0] == family.model_type]
    cells = [
        outcome_cell([o for checks in mine for o in checks.get(check, [])]) for check in ("replay", "masked", "reload")
    ]
    stock = "all" if family.uniform == family.units else ", ".join(family.uniform) or "-"
    variants = [name.partition("/")[2] for name in outcomes if name.startswith(f"{family.model_type}/")]
    note = "; ".join(filter(None, [family.note, f"also tested: {', '.join(variants)}" if variants else ""]))
    return f"| {family.model_type} | {', '.join(family.units)} | {stock} | {' | '.join(cells)} | {note} |"


def page(record: dict) -> str:
    """The whole page."""
    listed = families()
    multimodal = [family for family in listed if family.inside]
    supported = [family for family in listed if family.units and not family.inside]
    listed = [family for family in listed if not family.inside]
    levels = {level: sum(f.level == level for f in listed) for level in ("supported", "FFN only", "refused")}
    reasons: dict[str, list[str]] = {}
    for family in listed:
        if not family.units:
            reasons.setdefault(family.note, []).append(family.model_type)
    lines = [
        "# Families",
        "",
        f"Written by `benchmarks/families.py` on {record['date']} with transformers {record['transformers']}, torch "
        f"{record['torch']}: {levels['supported']} families with heads and FFN, {levels['FFN only']} with the FFN "
        f"only, {levels['refused']} refused; {len(multimodal)} multimodal models with one of them inside.",
        "",
        *TEXT.strip().splitlines(),
        "",
        "| family | can be removed | in a stock class | replay | masked | reload | note |",
        "|---|---|---|---|---|---|---|",
        *(row(family, record["outcomes"]) for family in supported),
        "",
        "## Multimodal models",
        "",
        "The language model inside is pruned on text; all else stays. Which one it is depends on the checkpoint; here "
        "it is that of the default config.",
        "",
        "| model | its language model | can be removed | note |",
        "|---|---|---|---|",
        *(f"| {f.model_type} | `{f.inside}` | {', '.join(f.units)} | {f.note} |" for f in multimodal),
        "",
        "## Refused",
        "",
        *(f"- {', '.join(names)}: {reason}." for reason, names in reasons.items()),
        "",
        "Whatever is not on this page nobody has described: [adding-a-family.md](../../docs/adding-a-family.md).",
        "",
    ]
    return "\n".join(lines)


def run(names: list[str]) -> dict[str, dict[str, list[str]]]:
    """The outcomes of some families' tests."""
    outcomes = Outcomes()
    arguments = [
        str(ROOT / "tests/models/test_families.py"),
        str(ROOT / "tests/models/test_mixtures.py"),
        "-m",
        "families",
        "-q",
        "-p",
        "no:xdist",
        "--only",
        ",".join(names),
    ]
    pytest.main(arguments, plugins=[outcomes])
    return outcomes.found


def main() -> None:
    """Run the tests of families, a few at a time so that what is done is kept, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these, from the table of tests")
    parser.add_argument("--page-only", action="store_true", help="write the page from benchmarks/results/families.json")
    options = parser.parse_args()
    record = json.loads(JSON.read_text(encoding="utf-8")) if JSON.is_file() else {"outcomes": {}}
    names = [] if options.page_only else options.families or [*NAMES, *OWN_OF_MIXTURES]
    for start in range(0, len(names), TOGETHER):
        record["outcomes"] |= run(names[start : start + TOGETHER])
        record |= {name: version(name) for name in ("transformers", "torch")} | {"date": date.today().isoformat()}
        JSON.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(record), encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")


if __name__ == "__main__":
    main()
