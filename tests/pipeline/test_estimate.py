"""What pruning will cost, counted from shapes alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from slimgpt.config import make_config
from slimgpt.models.parameter_counts import describe
from slimgpt.pipeline.estimate import all_flops
from slimgpt.planning.cost import pruning_flops, pruning_seconds
from slimgpt.planning.planner import plan_for
from slimgpt.sensitivity.windows import split_windows

CONFIG = LlamaConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, intermediate_size=160,
    head_dim=16, vocab_size=500,
)  # fmt: skip
SHAPE = describe(CONFIG)
WINDOWS = torch.empty(128, 512, device="meta")


def flops(**options):
    config = make_config(ratio=0.5, num_samples=128, seq_len=512, **options)
    plan = plan_for(CONFIG, config, SHAPE)
    return all_flops(CONFIG, config, SHAPE, plan, WINDOWS), plan


def test_a_schedule_without_training_costs_the_loop_alone():
    estimated, plan = flops(allocation="schedule", distill="off", evaluate=False)
    dense = [layer.sizes for layer in SHAPE.layers]
    assert estimated == {**pruning_flops(CONFIG, dense, plan.layers, WINDOWS.numel(), 512), "gradients": 0.0}
    assert flops(method="paper")[0]["gradients"] == 0.0
    # Two texts of a thirty-second each, through the dense and the pruned model.
    compared = flops(allocation="schedule", distill="off")[0]["forward"] - estimated["forward"]
    heads = 2.0 * CONFIG.vocab_size * CONFIG.hidden_size
    assert compared == pytest.approx(4 * (estimated["dense forward"] / 32 + heads * WINDOWS.numel() / 32))


def test_training_costs_forward_passes_as_many_as_promised_and_its_heads():
    estimated, plan = flops(allocation="schedule")
    tokens = int(1.4 * WINDOWS.numel() / (1 + 7 / 3 * (1 - plan.achieved)))
    heads = tokens * 3 * 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert estimated["gradients"] == pytest.approx(1.4 * estimated["dense forward"] + heads, rel=1e-3)
    half = flops(allocation="schedule", distill=tokens // 2)[0]["gradients"]
    assert half == pytest.approx(estimated["gradients"] / 2, rel=1e-3)


def test_a_search_tries_three_plans():
    plain = flops(allocation="schedule", distill="off")[0]
    one, searched = (flops(allocation=name, distill="off")[0] for name in ("sensitivity", "search"))
    for part in ("forward", "hessian", "solver"):
        assert one[part] - plain[part] > 0
        assert searched[part] - plain[part] == pytest.approx(3 * (one[part] - plain[part]))
    # Forth, the dense model each time, and four points of paths; from two of them back, which costs 4/3 more.
    layers = plain["dense forward"] / WINDOWS.numel()
    heads = 2.0 * CONFIG.vocab_size * CONFIG.hidden_size
    tokens = split_windows(WINDOWS, max(CONFIG.intermediate_size, CONFIG.hidden_size))[1].numel()
    for estimated, forth, back in ((one, 2, 1), (searched, 7, 2)):
        expected = tokens * (layers * (forth + back * 7 / 3) + heads * (forth + back))
        assert estimated["gradients"] == pytest.approx(expected)
    cpu = torch.device("cpu")
    assert pruning_seconds(searched, cpu, torch.float32) > 0
