"""A scan: what it measures is what a pruning reports, what it predicts goes through that, and the model stays."""

from __future__ import annotations

import importlib
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.config import make_config
from slimgpt.errors import NumericalError, UsageError
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.allocation import POWERS, Sensitivity, StructureCost, predicted_cost
from slimgpt.planning.plan import plan_of_widths
from slimgpt.planning.planner import make_plan
from slimgpt.scanning.points import Loss
from slimgpt.scanning.prediction import LossPredictor, MeasuredSize
from tests.models.families import tiny_model

OPTIONS = {"num_samples": 24, "seq_len": 48, "device": "cpu", "allocation": "sensitivity", "distill": 300}
POINTS = [0.1, 0.3]


@pytest.fixture(scope="module")
def scanned(text_file, tokenizer):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    report = slimgpt.scan(model, tokenizer, str(text_file), points=POINTS, **OPTIONS)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert model.config.to_dict() == config
    return report


def point(report, ratio):
    return next(each for each in report.points if each.ratio == pytest.approx(ratio))


@pytest.mark.parametrize("ratio", POINTS)
def test_measured_sizes_are_what_a_pruning_reports(scanned, ratio, text_file, tokenizer):
    model = tiny_model("llama")
    report = slimgpt.prune(model, tokenizer, ratio, str(text_file), **OPTIONS)
    own = point(scanned, ratio)
    assert own.measured
    assert own.parameters == sum(parameter.numel() for parameter in model.parameters())
    for name in ("bundled", "held_out"):
        values = report.divergence[name]
        assert own.losses[name] == Loss(values["kl"]["mean"], values["bits_per_byte"], values["same_top"])


def test_all_sizes_are_there_and_only_the_given_ones_are_measured(scanned):
    ratios = [each.ratio for each in scanned.points]
    assert ratios == sorted(ratios)
    assert {each.ratio for each in scanned.points if each.measured} == set(POINTS)
    shares = {round(ratio, 2) for ratio in ratios} | {float(ratio) for ratio in scanned.omitted}
    assert shares == {number / 100 for number in range(5, 61, 5)}
    parameters = [each.parameters for each in scanned.points]
    assert parameters == sorted(parameters, reverse=True)
    assert parameters[0] < scanned.parameters
    for field in ("prefill", "decode"):
        values = [getattr(each, field) for each in scanned.points]
        assert values == sorted(values)
        assert values[0] > 1


def test_the_recommendation_is_the_largest_size_within_the_bound(scanned):
    kls = [each.losses["bundled"].kl for each in scanned.points]
    for bound in (min(kls) / 2, *[kl + 1e-9 for kl in kls]):
        report = replace(scanned, max_kl=bound)
        within = [each for count, each in enumerate(scanned.points) if max(kls[: count + 1]) <= bound]
        assert report.recommended == (within[-1] if within else None)
        assert f"{bound:g}" in report.reason
        assert ("more calibration text" in report.reason) == (not within)


def test_a_report_is_one_line_a_table_a_picture_and_json(scanned):
    assert "\n" not in repr(scanned)
    lines = scanned.summary().splitlines()
    assert len(lines) == len(scanned.points) + 4
    assert max(map(len, lines[:-1])) <= 80
    values = json.loads(json.dumps(scanned.to_json()))
    assert [each["ratio"] for each in values["points"]] == [each.ratio for each in scanned.points]
    assert values["reason"] == scanned.reason
    assert [each["ratio"] for each in values["prunings"]] == POINTS
    figure = scanned.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # as a notebook shows it
    divergence, agreement, speed = figure.axes
    assert divergence.get_yscale() == "log"
    assert "%" in agreement.get_ylabel()
    lines = speed.get_lines()
    assert len({line.get_marker() for line in lines} - {"None", ""}) == 2
    assert scanned._repr_html_().count("<tr>") == len(scanned.points) + 1


def synthetic(exponent: float):
    """Sizes whose losses are a power of the predicted cost."""
    model = tiny_model("llama")
    shape = describe(model.config, model)
    costs = Sensitivity(
        0.2,
        tuple(
            StructureCost(layer, unit, 0.5, 0.01 * (layer + 1) * (2 if unit == "ffn" else 1))
            for layer in range(len(shape.layers))
            for unit in ("ffn", "query")
        ),
    )
    plans = {ratio: make_plan(model.config, ratio, shape=shape, head_unit="query") for ratio in (0.1, 0.2, 0.3, 0.4)}

    def losses(plan):
        cost = predicted_cost(plan, shape, costs)
        return {"bundled": Loss(cost**exponent, 2 * cost**exponent, 1 / (1 + cost))}

    sizes = [MeasuredSize(plans[ratio], costs, losses(plans[ratio])) for ratio in (0.1, 0.3, 0.4)]
    return LossPredictor(sizes, shape, make_config(), model.config), plans, losses


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.7])
def test_a_prediction_is_the_mean_of_two_curves(exponent):
    """Scipy's monotone cubics: in the cost, of which these losses are powers, and in the share removed."""
    interpolate = pytest.importorskip("scipy.interpolate")
    predictor, plans, losses = synthetic(exponent)
    sizes = [size.plan for size in predictor.sizes]

    def by_share(values, plan):
        x = [math.log(each.achieved / (1 - each.achieved)) for each in (*sizes, plan)]
        return float(interpolate.PchipInterpolator(x[:-1], values)(x[-1]))

    for ratio, plan in plans.items():
        predicted, exact = predictor.losses(plan)["bundled"], losses(plan)["bundled"]
        kl = by_share([math.log(losses(each)["bundled"].kl) for each in sizes], plan)
        shares = [losses(each)["bundled"].same_top for each in sizes]
        top = by_share([math.log(share / (1 - share)) for share in shares], plan)
        # In the logarithm of the cost both are straight lines, so that curve is exact.
        assert math.log(predicted.kl) == pytest.approx((math.log(exact.kl) + kl) / 2, rel=1e-6)
        own = math.log(exact.same_top / (1 - exact.same_top))
        assert math.log(predicted.same_top / (1 - predicted.same_top)) == pytest.approx((own + top) / 2, rel=1e-6)
        assert predicted.bits_per_byte == pytest.approx(2 * predicted.kl, rel=1e-6)
        if ratio != 0.2:  # measured
            assert predicted.kl == pytest.approx(exact.kl, rel=1e-6)


def test_a_cost_is_the_sum_of_the_structures():
    model = tiny_model("llama")
    shape = describe(model.config, model)
    first = shape.layers[0].sizes
    costs = Sensitivity(0.3, (StructureCost(0, "ffn", 0.5, 0.1), StructureCost(1, "query", 0.5, 0.2)))
    layers = [dict(layer.sizes) for layer in shape.layers]
    layers[0]["intermediate_size"] = first["intermediate_size"] // 4
    layers[1]["num_attention_heads"] = first["num_key_value_heads"]
    plan = plan_of_widths(shape, layers, "query")
    channels = 1 - layers[0]["intermediate_size"] / first["intermediate_size"]
    heads = 1 - first["num_key_value_heads"] / first["num_attention_heads"]
    expected = 0.1 * (channels / 0.5) ** POWERS["ffn"] + 0.2 * (heads / 0.5) ** POWERS["query"]
    assert predicted_cost(plan, shape, costs) == pytest.approx(expected)


def test_costs_that_do_not_ascend_give_way_to_the_share_removed():
    """Each size's costs were measured by itself; those of the larger one may be smaller."""
    predictor, plans, _ = synthetic(1.0)
    costs = predictor.sizes[1].costs
    low = replace(costs, contributions=tuple(replace(one, cost=one.cost / 1000) for one in costs.contributions))
    sizes = [predictor.sizes[0], replace(predictor.sizes[1], costs=low), predictor.sizes[2]]
    other = LossPredictor(sizes, predictor.shape, predictor.config, predictor.model_config)
    for size in sizes:
        assert other.losses(size.plan)["bundled"].kl == pytest.approx(size.losses["bundled"].kl)
    between = other.losses(plans[0.2])["bundled"].kl
    assert sizes[0].losses["bundled"].kl < between < sizes[1].losses["bundled"].kl
    twice = LossPredictor([sizes[0], *sizes], predictor.shape, predictor.config, predictor.model_config)
    assert twice.losses(plans[0.2])["bundled"].kl == pytest.approx(between)


def test_a_schedule_is_predicted_from_the_share_removed(text_file, tokenizer):
    report = slimgpt.scan(
        tiny_model("llama"), tokenizer, str(text_file), points=[0.1, 0.2, 0.3], **{**OPTIONS, "allocation": "schedule"}
    )
    kls = [each.losses["bundled"].kl for each in report.points if 0.1 <= each.ratio <= 0.3]
    ends = [kls[0], kls[2], kls[4]]
    if ends == sorted(ends):
        assert kls == sorted(kls)
    assert all(kl > 0 for kl in kls)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_kl": 0.0}, "max_kl 0.0 must be a number of nats above 0"),
        ({"max_kl": float("nan")}, "max_kl nan must be"),
        ({"points": [0.1]}, "at least two different ratios"),
        ({"points": [0.1, 0.1]}, "at least two different ratios"),
        ({"points": [0.1, 30]}, "did you mean 0.3"),
        ({"ratio": 0.2}, "no setting ratio"),
        ({"params": "1M"}, "no setting params"),
        ({"schedule": [0.1, 0.2]}, "names one size"),
        ({"dtype": "float16"}, "loaded by name"),
        ({"points": [0.1, 0.99]}, "Ask for a smaller ratio"),
        ({"points": [0.2, 0.2001], "uniform": True}, "points 0.2 and 0.2001 both remove"),
    ],
)
def test_what_cannot_be_scanned_is_refused_at_once(given, message, tokenizer):
    with pytest.raises(UsageError, match=re.escape(message)):
        slimgpt.scan(tiny_model("llama"), tokenizer, "no-such-file.txt", **given)


def test_sizes_below_one_that_ends_in_nan_are_kept(text_file, tokenizer, monkeypatch):
    module = importlib.import_module("slimgpt.scanning.run")
    prune, tried = module._prune, []

    def failing(model, job, ratio, *rest):
        tried.append(ratio)
        if ratio > 0.25:
            raise NumericalError("layer 2 gives NaN")
        return prune(model, job, ratio, *rest)

    monkeypatch.setattr(module, "_prune", failing)
    options = {**OPTIONS, "allocation": "schedule", "distill": "off"}
    call = {"tokenizer": tokenizer, "calibration": str(text_file), **options}
    report = slimgpt.scan(tiny_model("llama"), points=[0.1, 0.2, 0.3, 0.4], **call)
    assert tried == [0.1, 0.2, 0.3]
    assert [each.ratio for each in report.points] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert [each.ratio for each in report.points if each.measured] == [0.1, 0.2]
    assert [each["ratio"] for each in report.prunings] == [0.1, 0.2]
    reason = report.omitted["0.3"]
    assert reason == "removing 30% ends in no numbers (layer 2 gives NaN); larger sizes are not predicted"
    assert next(iter(report.omitted)) == "0.3"
    assert {float(ratio) for ratio in report.omitted} == {number / 100 for number in range(30, 61, 5)}
    with pytest.raises(NumericalError, match="layer 2"):  # one size tells nothing of the others
        slimgpt.scan(tiny_model("llama"), points=[0.2, 0.3], **call)


def test_without_a_tokenizer_there_is_no_text_to_compare_on():
    windows = torch.randint(50, (24, 48))
    with pytest.raises(UsageError, match="give the tokenizer"):
        slimgpt.scan(tiny_model("llama"), None, windows, points=POINTS, **OPTIONS)


def test_the_command_writes_a_table_and_a_picture(dense_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    given = ["scan", dense_folder, "--calibration", text_file, "--points", "0.1,0.3", "--num-samples", 12]
    given += ["--seq-len", 48, "--device", "cpu", "--max-kl", 5, "--out", tmp_path / "scan"]
    words = [str(word) for word in given]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    values = json.loads((tmp_path / "scan/scan.json").read_text())
    assert (tmp_path / "scan/scan.png").read_bytes().startswith(b"\x89PNG")
    table = [line for line in done.output.splitlines() if re.match("[│┃┏┡└]", line)]
    assert len(table) == len(values["points"]) + 4
    assert max(map(len, table)) <= 80
    assert f"--ratio {values['recommended']:g}" in done.output
    assert values["reason"] in done.output
    assert not list((tmp_path / "scan").glob(".*"))
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    bad = CliRunner().invoke(app, [*words, "--overwrite", "--points", "a,b"])
    assert bad.exit_code == 2
    assert "no list of ratios" in bad.output


def test_a_place_that_cannot_be_written_to_is_refused_before_the_run(dense_folder, text_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    words = ["scan", str(dense_folder), "--calibration", str(text_file), "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "file" / "scan")])
    assert result.exit_code == 2
    assert "is a file; give another --out" in " ".join(result.output.split())
    assert "table:" not in result.output
