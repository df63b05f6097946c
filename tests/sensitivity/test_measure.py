"""What structures have lost, against the narrowed model itself and against differences along the path."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import slimgpt
from slimgpt.config import make_config
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.parameter_counts import describe
from slimgpt.planning import Sensitivity, allocate_budget, interpolate, trial_plan
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.in_place import prune_model
from slimgpt.pruning.loop import prune_layers
from slimgpt.runtime.memory import Placement
from slimgpt.sensitivity.measure import ENDPOINT, MIDPOINT, SIMPSON, measure
from slimgpt.sensitivity.windows import split_windows
from tests.models.families import tiny_model, windows

IDS = windows(12, 24)
CONFIG = make_config(ratio=0.3, batch_size=5)


def run(place: str = "device") -> ExecutionContext:
    return ExecutionContext(torch.device("cpu"), Placement(0 if place == "device" else 10**9, place, place))


def case(family: str):
    """A model in fp64, and a plan that narrows every structure of it."""
    model = tiny_model(family).double()
    shape = describe(model.config, model)
    plan = trial_plan(plan_for(model.config, CONFIG, shape), shape)
    return model, plan, model.get_submodule(slimgpt.ARCHITECTURES[family].layers)


def divergence(model, dense, ids) -> float:
    with torch.no_grad():
        log_p, log_q = (m(ids).logits[:, 1:].log_softmax(-1) for m in (dense, model))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_the_divergence_is_that_of_the_pruned_model_and_its_parts_sum_up_to_it(family):
    model, plan, layers = case(family)
    measured = measure(model, layers.__getitem__, IDS, plan, CONFIG, run())
    fit, probe = split_windows(IDS, 52)
    assert not {tuple(row) for row in fit.tolist()} & {tuple(row) for row in probe.tolist()}
    slim = copy.deepcopy(model)
    for _ in prune_model(slim, fit, plan, CONFIG, run()):
        pass
    assert measured.divergence == pytest.approx(divergence(slim, model, probe), rel=1e-6)
    assert sum(part.cost for part in measured.contributions) == pytest.approx(
        measured.divergence, rel=0.2 if family == "gemma2" else 0.06
    )
    assert len(measured.contributions) == 2 * len(layers)
    parts, whole = (
        measure(model, layers.__getitem__, IDS, plan, CONFIG, run(), points=p) for p in (MIDPOINT, ENDPOINT)
    )
    assert parts.contributions == measured.contributions
    assert parts.divergence == pytest.approx(sum(part.cost for part in parts.contributions), rel=1e-12)
    assert (whole.divergence, whole.contributions) == (measured.divergence, ())


@pytest.mark.parametrize(("family", "points"), [("llama", MIDPOINT), ("gpt2", MIDPOINT), ("llama", SIMPSON)])
def test_a_part_is_the_integral_of_the_slope_along_the_path(family, points):
    model, plan, layers = case(family)
    measured = measure(model, layers.__getitem__, IDS, plan, CONFIG, run(), points=points)
    fit, probe = split_windows(IDS, 52)
    structures = {s.unit: s for s in slimgpt.ARCHITECTURES[family].chosen(plan.head_unit)}
    step = {}
    for finished in prune_layers(model, layers.__getitem__, fit, plan, CONFIG, run()):
        layer = finished.report.layer
        for unit, structure in structures.items():
            W = layers[layer].get_submodule(structure.output).weight
            n = W.shape[0] if structure.transposed else W.shape[1]
            kept = torch.tensor(finished.report.kept[structure.name])
            width = n // structure.units(slimgpt.pruning.layer.layer_sizes(model.config)[layer])
            columns = (kept.unsqueeze(1) * width + torch.arange(width)).flatten()
            full = torch.zeros_like(W.data)
            narrow = finished.state[structure.key]
            if structure.transposed:
                full[columns] = narrow
            else:
                full[:, columns] = narrow
            step[layer, unit] = full - W.data

    def at(alphas: dict) -> float:
        moved = copy.deepcopy(model)
        inner = moved.get_submodule(slimgpt.ARCHITECTURES[family].layers)
        for (layer, unit), change in step.items():
            inner[layer].get_submodule(structures[unit].output).weight.data += alphas[layer, unit] * change
        return divergence(moved, model, probe)

    e = 0.01  # norms compute in fp32
    for part in measured.contributions:
        key, expected = (part.layer, part.unit), 0.0
        for alpha, weight in points:
            point = dict.fromkeys(step, alpha)
            slope = (at({**point, key: alpha + e}) - at({**point, key: alpha - e})) / (2 * e)
            expected += weight * slope
        assert part.cost == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_measuring_changes_nothing():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    before = {name: (p.data.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(IDS).logits
    shape = describe(model.config, model)
    plan = trial_plan(plan_for(model.config, CONFIG, shape), shape)
    measure(model, model.model.layers.__getitem__, IDS, plan, CONFIG, run())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_what_is_kept_in_files_and_run_in_other_batches_gives_the_same():
    model, plan, layers = case("llama")
    measurements = [
        measure(model, layers.__getitem__, IDS, plan, replace(CONFIG, batch_size=size), run(place))
        for size, place in ((5, "device"), (5, "file"), (2, "device"))
    ]
    for other in measurements[1:]:
        assert other.divergence == pytest.approx(measurements[0].divergence, rel=1e-6)
        for one, two in zip(measurements[0].contributions, other.contributions):
            assert two.cost == pytest.approx(one.cost, rel=1e-5, abs=1e-10)


def test_a_search_takes_the_better_of_what_it_measured_and_what_it_was_given():
    options = {"ratio": 0.3, "calibration": IDS, "batch_size": 5, "device": "cpu"}
    report = slimgpt.prune(tiny_model("llama"), None, allocation="search", **options)
    tried = report.allocation["tried"]
    assert len(tried) == 2
    model = tiny_model("llama")
    measured = measure(model, model.model.layers.__getitem__, IDS, report.plan, CONFIG, run())
    assert measured.divergence == pytest.approx(min(tried), rel=1e-3)
    assert report.allocation["divergence"] == min(tried)


@pytest.mark.parametrize(("allocation", "steps"), [("sensitivity", 12), ("search", 28)])
def test_every_step_of_the_measuring_is_reported(allocation, steps):
    calls = []
    options = {"ratio": 0.3, "calibration": IDS, "batch_size": 5, "device": "cpu", "distill": "off"}
    slimgpt.prune(tiny_model("llama"), None, allocation=allocation, on_measured=lambda *c: calls.append(c), **options)
    assert [call[:2] for call in calls] == [(number, steps) for number in range(steps)]


def test_what_was_measured_is_followed_and_reported():
    options = {"ratio": 0.3, "calibration": IDS, "batch_size": 5, "device": "cpu"}
    report = slimgpt.prune(tiny_model("llama"), None, allocation="sensitivity", **options)
    scheduled = slimgpt.prune(tiny_model("llama"), None, allocation="schedule", **options)
    assert report.allocation["by"] == "sensitivity"
    assert scheduled.allocation == {}
    assert report.plan.layers != scheduled.plan.layers
    assert report.plan.parameters <= scheduled.plan.parameters
    assert report.plan.achieved == pytest.approx(scheduled.plan.achieved, abs=0.002)
    model = tiny_model("llama")
    shape = describe(model.config, model)
    costs = json.loads(json.dumps(report.to_json()))["allocation"]["contributions"]
    costs = Sensitivity(0.0, tuple(slimgpt.planning.StructureCost(**cost) for cost in costs))
    cheapest = allocate_budget(scheduled.plan, shape, costs)
    expected = interpolate(scheduled.plan, cheapest, shape, 1 - scheduled.plan.achieved)
    assert expected.layers == report.plan.layers
    assert cheapest.layers != expected.layers


def test_a_smaller_cache_keeps_its_heads():
    options = {"params": 50_000, "kv_cache": "21KB@64", "calibration": IDS, "batch_size": 5, "device": "cpu"}
    report = slimgpt.prune(tiny_model("llama"), None, allocation="sensitivity", **options)
    scheduled = slimgpt.prune(tiny_model("llama"), None, allocation="schedule", **options)
    for measured, by_rule in zip(report.plan.layers, scheduled.plan.layers):
        assert measured["num_key_value_heads"] == by_rule["num_key_value_heads"]
    assert report.plan.parameters <= 50_000


@pytest.mark.parametrize("other", [{"schedule": "uniform"}, {"ratio": None, "kv_cache": "1GB@32k"}])
def test_two_ways_to_choose_widths_are_refused(other):
    with pytest.raises(slimgpt.SlimGPTError, match="allocation 'sensitivity'"):
        make_config(**{"ratio": 0.3, "allocation": "sensitivity", **other})


def test_an_unknown_allocation_lists_the_known_ones():
    with pytest.raises(slimgpt.SlimGPTError, match="sensitivity"):
        make_config(ratio=0.3, allocation="best")


def test_by_default_it_is_measured_where_there_are_tokens_enough():
    allocations = {}
    for count in (8, 40):
        model = tiny_model("llama")  # 52 channels: 208 tokens for the trial run, beside those that are compared
        allocations[count] = slimgpt.prune(model, None, 0.3, windows(count, 24), device="cpu").allocation
    assert allocations[8] == {}
    assert allocations[40]["by"] == "sensitivity"
    paper = slimgpt.prune(tiny_model("llama"), None, 0.3, windows(40, 24), device="cpu", method="paper")
    assert paper.settings.allocation == "schedule"
    assert paper.allocation == {}
