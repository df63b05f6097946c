"""Results of measurements are one line at a prompt, and a table in a notebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

import slimgpt
from slimgpt.config import make_config
from slimgpt.errors import UsageError
from slimgpt.io.result import Result


@dataclass(frozen=True, repr=False)
class Example(Result):
    folder: Path
    loss: float
    layers: tuple[int, ...]
    protocol: dict[str, int] = field(default_factory=dict)
    note: str | None = None


EXAMPLE = Example(Path("<slim>"), 1 / 3, (1, 2, 3), {"window": 128})


def test_a_result_is_one_line_a_summary_and_a_table():
    assert repr(EXAMPLE) == "<Example: folder <slim>, loss 0.333333, layers 3>"
    assert EXAMPLE.summary() == "folder  <slim>\nloss    0.333333\nlayers  3"
    assert "<tr><th>folder</th><td>&lt;slim&gt;</td></tr>" in EXAMPLE._repr_html_()


@pytest.mark.parametrize(
    "name",
    [
        "Comparison", "EngineVerification", "Estimate", "ExportReport", "Inspection", "Perplexity", "Recovery",
        "TaskScores", "Timings", "Verification",
    ],
)  # fmt: skip
def test_every_public_result_is_shown_so(name):
    cls = getattr(slimgpt, name)
    assert cls.__repr__ is Result.__repr__
    assert cls._repr_html_ is Result._repr_html_


def test_wrong_calls_say_what_is_meant(text_file):
    with pytest.raises(UsageError, match="pruning has no setting 'ratoi'; did you mean ratio"):
        make_config(ratoi=0.2)
    with pytest.raises(UsageError, match=r"model is a str, not a loaded model; load it with slimgpt\.load"):
        slimgpt.prune("demo", None, calibration=str(text_file))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="text is a list; give the path of a text file"):
        slimgpt.evaluate(None, None, ["some text"])  # type: ignore[arg-type]
