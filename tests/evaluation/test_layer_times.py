"""Times of a layer's parts: what a clock that adds up over layers says is recovered, width by width."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import slimgpt.evaluation.layer_times as layer_times
import slimgpt.evaluation.reached_speed as reached
from slimgpt.errors import PlanError
from slimgpt.evaluation.layer_times import Seconds, measure_table, request_seconds
from slimgpt.evaluation.speed import Speed
from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import count_tied, describe
from slimgpt.models.random_weights import random_model
from slimgpt.planning import make_plan
from slimgpt.planning.planner import natural_unit
from slimgpt.planning.speed_table import SpeedTable, mismatch, table_model
from tests.models.families import tiny_model

CPU = torch.device("cpu")
REST, LAYER, TOKEN = 0.3, 0.01, 1 / 7


def clock(layers, types) -> float:
    """Seconds of a prompt: of what is around the layers, of every layer, and more of heads with full attention."""
    total = REST
    for index, layer in enumerate(layers):
        if not hasattr(layer, "mlp"):
            continue
        attention = layer.self_attn
        dear = 2.0 if types[index] == "full_attention" else 1.0
        heads = attention.o_proj.in_features / attention.head_dim if hasattr(attention, "o_proj") else 0.0
        total += LAYER + 0.004 * dear * heads + 0.0005 * layer.mlp.down_proj.in_features
    return total


def table_by(
    monkeypatch, name: str, drift: bool = True, step: int = 1
) -> tuple[SpeedTable, list[str], torch.nn.Module]:
    """The table of a tiny model by that clock, which goes slower and slower."""
    model = tiny_model(name)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    calls = []

    def seconds(timed, *_):
        calls.append(timed)
        slow = 1 + 0.01 * len(calls) * drift
        prompt = slow * clock(timed.model.layers, types)
        return Seconds(prompt, TOKEN * prompt)

    monkeypatch.setattr(layer_times, "request_seconds", seconds)
    shape = describe(model.config, model)
    table = measure_table(
        model.config,
        shape,
        natural_unit(shape),
        step,
        batch=1,
        prompt=16,
        new_tokens=4,
        device=CPU,
        dtype=torch.float32,
    )
    return table, types, model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("drift", [False, True])
def test_times_are_recovered_by_kind_and_width_whatever_the_machine_drifts(monkeypatch, name, drift):
    table, types, model = table_by(monkeypatch, name, drift)
    sizes = layer_sizes(model.config)[0]
    scale = table.rest["prompt"] / REST  # a machine that is twice as slow has a table twice as slow
    assert scale == 1 if not drift else 1 < scale < 3
    assert len(table.kinds) == len(set(types))
    assert sorted(index for kind in table.kinds for index in kind.layers) == list(range(len(types)))
    for kind in table.kinds:
        dear = 2.0 if types[kind.layers[0]] == "full_attention" else 1.0

        def expected(heads, channels, dear=dear):
            return scale * (LAYER + 0.004 * dear * heads + 0.0005 * channels)

        for row in kind.attention:
            assert row["prompt"] == pytest.approx(expected(row["heads"], sizes[CHANNELS]))
        for row in kind.ffn:
            assert row["prompt"] == pytest.approx(expected(sizes[HEADS], row["channels"]))
        assert all(row["token"] == pytest.approx(TOKEN * row["prompt"]) for row in (*kind.attention, *kind.ffn))
        assert [row["heads"] for row in kind.attention][-1] == 0  # without attention
        assert kind.attention[0]["heads"] == sizes[HEADS]
        assert kind.ffn[0]["channels"] == sizes[CHANNELS]
    protocol = dict(zip(PROTOCOL, ("transformers", 1, 16, 4)))
    assert mismatch(table, table_model(model.config), "query", protocol, layers=layer_sizes(model.config)) is None


PROTOCOL = ("on", "batch", "prompt", "new_tokens")


@pytest.mark.parametrize("step", [1, 4])
def test_the_least_aligned_widths_of_a_step_are_timed(monkeypatch, step):
    table, _, _ = table_by(monkeypatch, "llama", step=step)
    widths = [row["channels"] for row in table.kinds[0].ffn[1:]]
    assert len(widths) >= 3
    assert all(width % step == 0 and width // step % 2 == 1 for width in widths)


def test_all_rows_of_times_are_taken_between_two_of_the_dense_model(monkeypatch):
    order = []

    def seconds(timed, *_):
        order.append(tuple(id(layer) for layer in timed.model.layers))
        return Seconds(1.0, 1.0)

    monkeypatch.setattr(layer_times, "request_seconds", seconds)
    model = tiny_model("llama")
    steps = []
    measure_table(
        model.config, describe(model.config, model), "query", 1, batch=1, prompt=8, new_tokens=2, device=CPU,
        dtype=torch.float32, rounds=2, on_timed=lambda *step: steps.append(step),
    )  # fmt: skip
    dense = max(set(order), key=order.count)
    places = [number for number, layers in enumerate(order) if layers == dense]
    assert places[0] == 0
    assert max(b - a for a, b in pairwise(places)) <= layer_times.BETWEEN_DENSE + 1
    assert [number for number, _, _ in steps] == list(range(steps[0][1])) == list(range(len(order)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "opt"])
def test_a_random_model_has_the_widths_asked_for_and_generates(name):
    dense = tiny_model(name)
    shape = describe(dense.config, dense)
    plan = make_plan(dense.config, 0.3, shape=shape)
    model = random_model(dense.config, plan.layers, CPU, torch.float32)
    assert count_tied(model) == plan.parameters
    assert type(model) is type(dense)
    logits = model(input_ids=torch.arange(6)[None]).logits
    assert bool(torch.isfinite(logits).all())
    times = request_seconds(model, torch.arange(6)[None], 3)
    assert min(times) > 0


def test_a_random_model_may_lack_attentions():
    dense = tiny_model("llama")
    sizes = [dict(each) for each in layer_sizes(dense.config)]
    sizes[2] |= {HEADS: 0, KV_HEADS: 0}
    model = random_model(dense.config, sizes, CPU, torch.bfloat16)
    shape = describe(dense.config, dense)
    assert count_tied(model) == shape.parameters - shape.layers[2].attention_parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert min(request_seconds(model, torch.arange(6)[None], 3)) > 0


def test_a_model_that_gives_no_cache_back_is_refused():
    model = tiny_model("recurrent_gemma")
    with pytest.raises(PlanError, match="'recurrent_gemma' gives no cache back"):
        measure_table(
            model.config, describe(model.config, model), "query", 1, batch=1, prompt=4, new_tokens=2, device=CPU,
            dtype=torch.float32,
        )  # fmt: skip


def test_what_was_reached_is_the_time_of_the_whole_request(monkeypatch):
    dense = tiny_model("llama")
    sizes = layer_sizes(dense.config)
    slim = make_plan(dense.config, 0.3).layers
    timed = []

    def speeds(models, *_):
        timed.extend(layer.mlp.down_proj.in_features for model in models for layer in model.model.layers)
        return [Speed(prefill=16.0, decode=2.0, first_token=1.0), Speed(prefill=32.0, decode=4.0, first_token=1.0)]

    monkeypatch.setattr(reached, "measure_speed", speeds)
    asked = {"batch": 2, "prompt": 16, "new_tokens": 4, "device": CPU, "dtype": torch.float32}
    report = reached.reached_speed(dense.config, sizes, slim, parameters=10, **asked)
    assert timed == [each[CHANNELS] for each in (*sizes, *slim)]
    assert report["dense"] == {"prompt": 2.0, "new_tokens": 4.0}
    assert report["reached"] == 2.0
    report = reached.reached_speed(dense.config, sizes, slim, parameters=10**15, **asked)
    assert report["reached"] is None
    assert "GB" in report["not_timed"]
