"""Measured widths of mixtures: the attribution against differences of the whole model, and the budget."""

from __future__ import annotations

import copy

import pytest
import torch

import slimgpt
from slimgpt.config import make_config
from slimgpt.errors import PlanError
from slimgpt.models.families.moe import SHARED, Experts
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.models.parameter_counts import describe
from slimgpt.planning import Sensitivity
from slimgpt.planning.allocation import StructureCost, allocate_budget, interpolate, trial_plan
from slimgpt.planning.ffn import FIELDS, free_units
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.loop import prune_layers
from slimgpt.pruning.report import units_of
from slimgpt.runtime.thresholds import other_thresholds
from slimgpt.sensitivity.allocate import uses_sensitivity
from slimgpt.sensitivity.measure import ENDPOINT, MIDPOINT, measure
from slimgpt.sensitivity.windows import split_windows
from tests.models.families import windows
from tests.models.mixtures import tiny_mixture
from tests.sensitivity.test_measure import CONFIG, divergence, run

IDS = windows(12, 24)
FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]


def mixture_case(family):
    model = tiny_mixture(family).double()
    model.set_experts_implementation("eager")
    shape = describe(model.config, model)
    return model, shape, trial_plan(plan_for(model.config, CONFIG, shape), shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trial_narrows_every_structure(family):
    _, shape, plan = mixture_case(family)
    for layer, sizes in zip(shape.layers, plan.layers):
        assert sizes["num_attention_heads"] < layer.sizes["num_attention_heads"]
        for unit in free_units(layer):
            assert sizes[FIELDS[unit]] < layer.sizes[FIELDS[unit]]
        if layer.experts is not None:
            assert sizes["num_experts"] == layer.sizes["num_experts"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_is_the_slope_along_the_path_of_the_whole_mixture(family):
    """All experts of a layer are one structure: their narrow matrices with zeros where channels are gone."""
    model, _, plan = mixture_case(family)
    layers, sizes = model.model.layers, layer_sizes(model.config)
    costs = measure(model, layers.__getitem__, IDS, plan, CONFIG, run(), points=MIDPOINT)
    fit, probe = split_windows(IDS, max(max(layer.values()) for layer in sizes))
    steps = {}
    for finished in prune_layers(model, layers.__getitem__, fit, plan, CONFIG, run()):
        index, report = finished.report.layer, finished.report
        for structure in lookup(model.config).chosen(plan.head_unit):
            if structure.key not in finished.state:
                continue
            W, narrow = layers[index].get_parameter(structure.key).data, finished.state[structure.key]
            full = torch.zeros_like(W)
            if isinstance(structure, Experts):
                for expert, mask in enumerate(report.experts.channels):
                    if structure.transposed:
                        full[expert][units_of(mask)] = narrow[expert]
                    else:
                        full[expert][:, units_of(mask)] = narrow[expert]
            else:
                width = W.shape[1] // structure.units(sizes[index])
                kept = torch.tensor(report.kept[structure.name])
                full[:, (kept.unsqueeze(1) * width + torch.arange(width)).flatten()] = narrow
            steps[index, structure.unit] = (structure.key, full - W)
    assert len(costs.contributions) == len(steps)

    def at(alphas):
        moved = copy.deepcopy(model)
        for (index, unit), (key, step) in steps.items():
            moved.model.layers[index].get_parameter(key).data += alphas[index, unit] * step
        return divergence(moved, model, probe)

    e = 1e-3
    for part in costs.contributions:
        key, middle = (part.layer, part.unit), dict.fromkeys(steps, 0.5)
        slope = (at({**middle, key: 0.5 + e}) - at({**middle, key: 0.5 - e})) / (2 * e)
        # Routers compute in fp32, and a token that changes its expert between the two makes a jump.
        assert part.cost == pytest.approx(slope, rel=0.1, abs=3e-6)
    whole = measure(model, layers.__getitem__, IDS, plan, CONFIG, run(), points=ENDPOINT)
    assert whole.divergence == pytest.approx(at(dict.fromkeys(steps, 1.0)), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_budget_is_met_and_goes_where_it_costs_little(family):
    model = tiny_mixture(family, intermediate_size=80) if family == "mixtral" else tiny_mixture(family)
    shape = describe(model.config, model)
    plan = plan_for(model.config, CONFIG, shape)
    last = len(shape.layers) - 1
    units = [(i, u) for i, layer in enumerate(shape.layers) for u in (plan.head_unit, *free_units(layer))]
    costs = Sensitivity(1.0, tuple(StructureCost(i, u, 0.3, 0.01 if i == last else 0.1) for i, u in units))
    cheapest = allocate_budget(plan, shape, costs)
    mixed = interpolate(plan, cheapest, shape, 0.5)
    largest = max(layer.unit_parameters[u] * 8 for layer in shape.layers for u in free_units(layer))
    for allocated in (cheapest, mixed):
        removed = allocated.parameters_before - allocated.parameters
        target = plan.parameters_before - plan.parameters
        assert target <= removed <= target + largest or allocated is plan
        for layer, sizes in zip(shape.layers, allocated.layers):
            if layer.experts is None:
                continue
            assert sizes["intermediate_size"] % 8 == 0
            assert sizes["num_experts"] == layer.sizes["num_experts"]
            if layer.experts.tied:
                assert sizes[SHARED] == layer.experts.tied * sizes["intermediate_size"]
    shares = [
        1 - sizes["intermediate_size"] / layer.sizes["intermediate_size"]
        for layer, sizes in zip(shape.layers, cheapest.layers)
    ]
    assert cheapest is plan or shares[last] == max(shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_measured_mixture_runs_and_says_so(family, tokenizer, text_file, tmp_path):
    tiny_mixture(family).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = {"ratio": 0.3, "num_samples": 24, "seq_len": 24, "batch_size": 3, "device": "cpu", "distill": "off"}
    options |= {"calibration": str(text_file), "allocation": "sensitivity"}
    streamed = slimgpt.prune_folder(str(tmp_path / "dense"), tmp_path / "slim", **options)
    model, _ = slimgpt.load(str(tmp_path / "dense"))
    held = slimgpt.prune(model, tokenizer, **options)
    assert streamed.allocation["by"] == held.allocation["by"] == "sensitivity"
    assert {c["unit"] for c in held.allocation["contributions"]} >= {"ffn"}
    assert streamed.plan.layers == held.plan.layers
    assert abs(held.plan.achieved - 0.3) < 0.05


def test_with_a_given_share_of_whole_experts_widths_go_by_the_schedule():
    config = make_config(ratio=0.3, whole_experts=0.5)
    assert config.whole_experts == 0.5
    with other_thresholds(min_training_tokens=10**9):
        report = slimgpt.prune(
            tiny_mixture("mixtral"), None, 0.3, windows(40, 24), whole_experts=0.5, batch_size=5, device="cpu"
        )
    assert report.allocation == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uniform": True}, "measures no equal layers of a mixture of experts.*leave out allocation, or uniform"),
        ({"whole_experts": 0.5}, "measures no whole experts of a mixture.*leave out allocation, or whole_experts"),
        ({"method": "reap"}, "measures no whole experts"),
    ],
)
@pytest.mark.parametrize("allocation", ["sensitivity", "search"])
def test_what_the_schedule_decides_is_not_measured_on_request(allocation, options, message):
    """It followed the schedule without a word; `auto`, which promises no more, still does."""
    model = tiny_mixture("mixtral")
    with pytest.raises(PlanError, match=message):
        slimgpt.prune(model, None, 0.3, windows(40, 24), device="cpu", allocation=allocation, **options)
    shape = describe(model.config, model)
    assert not uses_sensitivity(make_config(ratio=0.3, **options), shape, windows(40, 24))
    assert uses_sensitivity(make_config(ratio=0.3, allocation=allocation), shape, windows(40, 24))
