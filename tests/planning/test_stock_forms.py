"""Advice on stock classes: what `slimgpt plan` tells a family to ask for is what it then gives."""

from __future__ import annotations

import pytest

from slimgpt.errors import PlanError
from slimgpt.exporting.run import FORMATS
from slimgpt.models.architecture import is_uniform
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.engines import ENGINES, engine_support
from slimgpt.planning.planner import make_plan
from slimgpt.planning.stock_forms import padded_problem, uniform_problem
from tests.models.families import NAMES, tiny_config
from tests.models.mixtures import OWN_OF_MIXTURES

REPRESENTATIVE = (
    "llama", "gpt2", "lfm2", "minicpm3", "mixtral", "deepseek_v3", "nemotron_h",
)  # fmt: skip
RATIO = 0.1


def cases():
    """Every family of both tables; the default run has one of every layout."""
    for name in dict.fromkeys((*NAMES, *OWN_OF_MIXTURES)):
        marks = [pytest.mark.families] + ([] if name in REPRESENTATIVE else [pytest.mark.slow])
        yield pytest.param(name, marks=marks)


def equal_plan(config, shape):
    """A plan of equal layers near the ratio: tiny experts have few widths."""
    for ratio in (RATIO, 0.15, 0.2, 0.25, 0.3):
        try:
            return make_plan(config, ratio, shape=shape, uniform=True)
        except PlanError as error:
            problem = error
    raise problem


@pytest.mark.parametrize("name", cases())
def test_advice_is_accepted(name):
    config = tiny_config(name)
    shape = describe(config)
    plan = make_plan(config, RATIO, shape=shape)
    assert not is_uniform(plan.layers)
    verdicts = engine_support(config, plan.layers)
    assert {verdict.engine for verdict in verdicts} == set(ENGINES)
    advised = " ".join(f"{verdict.how} {verdict.change}" for verdict in verdicts)
    if "--uniform" in advised:
        equal = equal_plan(config, shape)
        assert is_uniform(equal.layers)
        assert FORMATS["hf-uniform"].problem(config, equal.layers) is None
    else:
        assert uniform_problem(config) is not None
        with pytest.raises(PlanError):
            make_plan(config, RATIO, shape=shape, uniform=True)
    for form, check in FORMATS.items():
        if f"--to {form}" in advised and form != "hf-uniform":
            assert check.problem(config, plan.layers) is None, form
    assert ("--to padded" in advised) == (padded_problem(config, plan.layers) is None)


def test_latent_attention_with_dense_layers_is_told_of_no_equal_layers():
    config = tiny_config("deepseek_v3")
    layers = make_plan(config, RATIO).layers
    for verdict in engine_support(config, layers):
        assert "--uniform" not in verdict.how + verdict.change, verdict.engine
    with pytest.raises(PlanError, match="leave out both"):
        make_plan(config, RATIO, uniform=True)
