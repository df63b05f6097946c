"""Measured costs against the dense model with one matrix narrowed by hand."""

from __future__ import annotations

import json

import pytest
import torch

import slimgpt
from slimgpt.api import make_config
from slimgpt.models.slicing import unit_rows
from slimgpt.pruning import Placement, Run, measure
from slimgpt.pruning.sensitivity import divide
from slimgpt.solver import CRITERIA, damp, group_sizes, reconstruct, select_channels
from tests.families import tiny_model, windows

IDS = windows(12, 24)


def run(device="cpu"):
    return Run(torch.device(device), Placement(0, "device", "device"))


def hessian(model, matrix, ids, damping):
    seen = []
    hook = matrix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    x = torch.cat(seen)
    return damp(x.T @ x / len(x), damping)


def divergence(model, dense, ids):
    with torch.no_grad():
        log_q = model(ids).logits[:, 1::2].log_softmax(-1)
    return float((dense.exp() * (dense - log_q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_cost_is_the_divergence_of_the_model_narrowed_in_one_place(family, layer):
    model = tiny_model(family)
    config = make_config(ratio=0.3)
    sizes = {"llama": (6, 3), "gemma2": (6, 3), "phi3": (6, 3)}.get(family)
    unit = "query" if sizes else "kv"
    layers = model.get_submodule(slimgpt.ARCHITECTURES[family].layers)
    found = measure(model, layers.__getitem__, IDS, unit, config, run())
    fit, probe = divide(IDS, 52)
    assert not {tuple(row) for row in fit.tolist()} & {tuple(row) for row in probe.tolist()}
    with torch.no_grad():
        dense = model(probe).logits[:, 1::2].log_softmax(-1)
    for name in (unit, "ffn"):
        structure = slimgpt.ARCHITECTURES[family].find(name)
        matrix = layers[layer].get_submodule(structure.output)
        curve = next(c for c in found.curves if (c.layer, c.unit) == (layer, name))
        W, before = matrix.weight.data.double(), matrix.weight.data.clone()
        H = hessian(model, matrix, fit, config.damping)
        n = W.shape[1]
        for share, cost in zip(curve.removed, curve.cost):
            if name == "ffn":
                keep = n - round(share * n)
                kept = select_channels(W, H, keep, group_sizes(n - keep, smallest=max((n - keep) // 16, 1)))
                columns = kept
            else:
                units, groups = (6, 3) if name == "query" else (n // (n // 6), 1)
                keep = round((1 - share) * units)
                kept = CRITERIA["slimgpt"].heads(W, H, units, keep, groups, torch.Generator())
                columns = unit_rows(n, units, kept)
            matrix.weight.data.zero_()
            matrix.weight.data[:, columns] = reconstruct(W @ H, H, columns).float()
            assert cost == pytest.approx(divergence(model, dense, probe), rel=2e-2, abs=2e-6)
            matrix.weight.data.copy_(before)


def test_measuring_changes_nothing():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(IDS).logits
    measure(model, model.model.layers.__getitem__, IDS, "query", make_config(ratio=0.3), run())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_was_measured_is_followed_and_reported():
    options = {"ratio": 0.3, "calibration": IDS, "batch_size": 5, "device": "cpu"}
    report = slimgpt.prune(tiny_model("llama"), None, allocation="sensitivity", **options)
    scheduled = slimgpt.prune(tiny_model("llama"), None, **options)
    assert report.allocation["by"] == "sensitivity"
    assert scheduled.allocation == {}
    assert report.plan.layers != scheduled.plan.layers
    assert report.plan.parameters <= scheduled.plan.parameters
    assert report.plan.achieved == pytest.approx(scheduled.plan.achieved, abs=0.002)
    assert len(json.loads(json.dumps(report.to_json()))["allocation"]["curves"]) == 8


def test_a_smaller_cache_keeps_its_heads():
    options = {"params": 50_000, "kv_cache": "21KB@64", "calibration": IDS, "batch_size": 5, "device": "cpu"}
    report = slimgpt.prune(tiny_model("llama"), None, allocation="sensitivity", **options)
    scheduled = slimgpt.prune(tiny_model("llama"), None, **options)
    for measured, by_rule in zip(report.plan.layers, scheduled.plan.layers):
        assert measured["num_key_value_heads"] == by_rule["num_key_value_heads"]
    assert report.plan.parameters <= 50_000


@pytest.mark.parametrize("other", [{"schedule": "uniform"}, {"uniform": True}, {"ratio": None, "kv_cache": "1GB@32k"}])
def test_two_ways_to_choose_widths_are_refused(other):
    with pytest.raises(slimgpt.SlimGPTError, match="allocation 'sensitivity'"):
        make_config(**{"ratio": 0.3, "allocation": "sensitivity", **other})


def test_an_unknown_allocation_lists_the_known_ones():
    with pytest.raises(slimgpt.SlimGPTError, match="sensitivity"):
        make_config(ratio=0.3, allocation="best")
