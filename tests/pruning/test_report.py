"""How a report shows itself: a line, a summary, a table, a figure; and the same again after JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import slimgpt
from slimgpt.pruning.report import PruneReport
from tests.models.families import tiny_model


@pytest.fixture(scope="module")
def report(tokenizer, text_file) -> PruneReport:
    options = {"num_samples": 8, "seq_len": 24, "device": "cpu", "distill": 48, "ratio": 0.3}
    return slimgpt.prune(tiny_model("llama"), tokenizer, calibration=str(text_file), **options)


def test_repr_is_one_short_line(report):
    text = repr(report)
    assert "\n" not in text
    assert len(text) < 120
    assert f"{report.plan.achieved:.2%}" in text


def test_the_summary_has_sizes_and_losses(report):
    lines = report.summary().splitlines()
    assert f"{report.plan.parameters_before:,} -> {report.plan.parameters:,}" in lines[3]
    assert max(map(len, lines)) < 140
    for values in report.divergence.values():
        if isinstance(values, dict):
            assert sum(f"KL {values['kl']['mean']:.3f}" in line for line in lines) >= 1
    assert sum(line.startswith("training") for line in lines) == 1


def test_the_table_is_escaped_html(report):
    html = replace(report, base_model="<b>&model")._repr_html_()
    assert "&lt;b&gt;&amp;model" in html
    assert "<b>" not in html
    assert html.count("<tr>") == len(report.summary().splitlines())


def test_the_figure_has_a_bar_per_layer(report):
    figure = report.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # as a notebook shows it
    for axes in figure.axes:
        assert len(axes.patches) == 2 * len(report.layers)
    heights = [bar.get_height() for bar in figure.axes[1].patches[len(report.layers) :]]
    assert heights == [layer["intermediate_size"] for layer in report.plan.layers]


def test_json_and_back(report):
    again = PruneReport.from_json(json.loads(json.dumps(report.to_json())))
    assert again.summary() == report.summary()
    assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(report.to_json()))
