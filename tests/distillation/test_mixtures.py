"""The training of pruned mixtures: through the whole model, and from folder to folder."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import slimgpt
from slimgpt.config import make_config
from slimgpt.distillation import sharded_adam
from slimgpt.distillation.data import build_distillation_data
from slimgpt.distillation.schedule import learning_rate
from slimgpt.distillation.trainer import Distillation
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.build import decoder_layers
from slimgpt.models.lookup import lookup
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.in_place import prune_model
from slimgpt.runtime.memory import Placement
from slimgpt.runtime.thresholds import other_thresholds
from tests.distillation.test_trainer import divergence, said_by
from tests.models.families import windows
from tests.models.mixtures import tiny_mixture
from tests.models.test_mixtures import NAMES, cases

IDS = windows(24, 24)
RUN = ExecutionContext(torch.device("cpu"), Placement(10**12, "device", "device"))


@pytest.fixture(autouse=True)
def short_steps():
    with other_thresholds(step_tokens=144):
        yield


class Scaled(nn.Module):
    """A parameter in units of its step: Adam moves every entry equally far, whatever its gradient's size."""

    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.scale = scale

    def forward(self, units: torch.Tensor) -> torch.Tensor:
        return units * self.scale

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / self.scale


def leave_unseen(layer, experts):
    """Zero the gradients of a router's rows whose experts saw no token."""
    for name, module in layer.named_modules():
        if name == experts.module:
            seen = module.parametrizations.down_proj.original.grad.flatten(1).norm(dim=1) > 0
            layer.get_submodule(experts.router).parametrizations.weight.original.grad[~seen] = 0.0


def trained_case(family: str, allocation: str):
    """A dense and a pruned mixture, and the training between them."""
    dense = tiny_mixture(family).double()
    dense.set_experts_implementation("eager")
    config = make_config(ratio=0.4, batch_size=3, allocation="schedule", whole_experts=0.5)
    plan = plan_for(dense.config, config, describe(dense.config, dense))
    slim = copy.deepcopy(dense)
    for _ in prune_model(slim, IDS, plan, config, RUN):
        pass
    budget = make_config(ratio=0.4, batch_size=3, allocation=allocation)
    data = build_distillation_data(dense, decoder_layers(dense).__getitem__, IDS, 300, budget, RUN)
    return dense, slim, Distillation(slim, decoder_layers(slim).__getitem__, plan, data, RUN)


@pytest.mark.parametrize(
    ("family", "others"),
    [("mixtral", 0.0), ("qwen2_moe", 0.0), ("gpt_oss", 0.0), ("deepseek_v3", 0.0), ("mixtral", 0.25)],
)
def test_it_is_adam_through_the_whole_mixture(family, others):
    """Output matrices of heads, dense FFNs, shared experts and experts, norms and routers; in a search all matrices.
    Every expert of a stack moves by a share of its own root mean square."""
    dense, slim, training = trained_case(family, "search" if others else "schedule")
    mirror = copy.deepcopy(slim).requires_grad_(False)
    info = training()
    architecture = lookup(dense.config)
    keys = {s.key for s in architecture.chosen(training.plan.head_unit)} | {f"{architecture.experts.router}.weight"}
    shares = {}
    for name, weight in mirror.named_parameters():
        local = name.split(".", 3)[-1]
        if not name.startswith("model.layers."):
            continue
        if local in keys or "norm" in local:
            shares[name] = 1.0
        elif others and weight.ndim > 1:
            shares[name] = others
    assert sum(name.endswith(architecture.experts.key) for name in shares) >= 2
    units = []
    for name, share in shares.items():
        weight = mirror.get_parameter(name)
        dims = tuple(range(weight.ndim))[-2:]
        module, _, leaf = name.rpartition(".")
        scale = share * weight.square().mean(dims, keepdim=True).sqrt()
        weight.requires_grad_()
        parametrize.register_parametrization(mirror.get_submodule(module), leaf, Scaled(scale))
        units.append(mirror.get_submodule(module).parametrizations[leaf].original)
    adam = torch.optim.Adam(units, lr=0.0, betas=sharded_adam.BETAS, eps=1e-300)  # 0 / 0 for experts that saw nothing
    curve, steps = [], training.data.steps
    assert len(steps) == 2
    for number, step in enumerate(steps):
        adam.zero_grad()
        losses = [divergence(mirror, dense, training.data.ids[b]) for b in step]
        loss = torch.cat([part.flatten() for part in losses]).sum()
        text = sum(said_by(mirror, training.data.ids[b]) for b in step)
        (loss + info["text_weight"] * text).backward()
        for layer in mirror.model.layers:
            leave_unseen(layer, architecture.experts)
        curve.append(float(loss.detach()) / sum(part.numel() for part in losses))
        adam.param_groups[0]["lr"] = info["rate"] * learning_rate(number, len(steps))
        adam.step()
    assert info["curve"] == pytest.approx(curve, rel=1e-4)
    before = {name: slim.get_parameter(name).detach().clone() for name in shares}
    training.apply(slim)
    with torch.no_grad():
        for name, first in before.items():
            module, _, leaf = name.rpartition(".")
            expected = getattr(mirror.get_submodule(module), leaf)
            moved, wanted = slim.get_parameter(name) - first, expected - first
            assert float(wanted.abs().max()) > 0, name
            # Moments are kept in bfloat16, and a gradient that is nearly zero has a sign of chance.
            assert float((moved - wanted).norm() / wanted.norm()) < 0.05, name
    untouched = [name for name, _ in slim.named_parameters() if name not in shares]
    assert all(torch.equal(slim.get_parameter(name), mirror.get_parameter(name)) for name in untouched)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_streamed_mixture_is_trained_as_one_in_memory(family, tokenizer, text_file, tmp_path):
    tiny_mixture(family).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = {"ratio": 0.3, "num_samples": 24, "seq_len": 24, "batch_size": 3, "device": "cpu", "whole_experts": 0.5}
    options |= {"calibration": str(text_file), "distill": 240, "damping": 1.0}
    streamed = slimgpt.prune_folder(str(tmp_path / "dense"), tmp_path / "slim", **options).distillation
    model, _ = slimgpt.load(str(tmp_path / "dense"))
    held = slimgpt.prune(model, tokenizer, **options).distillation
    assert held["steps"] >= 1
    assert streamed["curve"] == pytest.approx(held["curve"], rel=1e-3)
    assert streamed["kept"] == held["kept"]
    slim, _ = slimgpt.load(str(tmp_path / "slim"))
    untrained, _ = slimgpt.load(str(tmp_path / "dense"))
    slimgpt.prune(untrained, tokenizer, **{**options, "distill": "off"})
    with torch.no_grad():
        ours, theirs, before = (m(IDS[:2]).logits for m in (slim, model, untrained))
    if held["kept"]:
        assert (ours - theirs).norm() < 0.05 * (ours - before).norm()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", [cases(name) for name in NAMES])
def test_every_family_is_trained_with_its_router(family, monkeypatch):
    trainings = []
    begin = Distillation._begin
    monkeypatch.setattr(Distillation, "_begin", lambda self: (trainings.append(self), begin(self)))
    model = tiny_mixture(family)
    options = {"ratio": 0.2, "calibration": IDS, "batch_size": 3, "device": "cpu", "distill": 300}
    report = slimgpt.prune(model, None, **options)
    assert all(value > -1e-6 for value in report.distillation["curve"])  # NaN is not
    (training,), experts = trainings, lookup(model.config).experts
    for names, layer in zip(training.names, decoder_layers(model)):
        if experts.key not in layer.state_dict():
            continue
        assert experts.key in names
        assert any(name.startswith(f"{experts.router}.") for name in names)
        for number in names.values():
            assert bool(torch.isfinite(training.weights.get(number)).all())


def test_a_training_that_nobody_asked_for_needs_enough_text_and_no_other_kind_of_model():
    options = {"ratio": 0.4, "calibration": IDS, "batch_size": 3, "device": "cpu", "allocation": "schedule"}
    assert slimgpt.prune(tiny_mixture("mixtral"), None, **options).distillation == {}
    with other_thresholds(min_training_tokens=1):
        assert slimgpt.prune(tiny_mixture("mixtral"), None, **options).distillation["steps"] >= 1


def test_layers_that_hand_on_more_than_hidden_states_are_compared_with_the_dense_ones(tokenizer, text_file):
    options = {"ratio": 0.2, "calibration": str(text_file), "num_samples": 24, "seq_len": 24, "device": "cpu"}
    report = slimgpt.prune(tiny_mixture("glm_moe_dsa"), tokenizer, **options)
    assert report.divergence["held_out"]["kl"]["mean"] > 0
