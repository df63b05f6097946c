"""Every baseline removes what its paper says, at the size asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from baselines import COMPARED, METHODS
from baselines.flap import input_moments, rank_globally, unit_scores
from baselines.llm_pruner import layer_shares, unit_importance, weight_gradients
from baselines.obs import _channels
from baselines.shortgpt import block_influence, layers_to_keep
from baselines.units import CHANNELS, HEADS, Job, cut, decoder_layers, decoder_parameters, structures_of
from torch import Tensor
from transformers import PreTrainedModel

from slimgpt.models.lookup import layer_sizes
from slimgpt.models.slicing import unit_rows
from slimgpt.solver import reconstruct, relative_error
from tests.models.families import tiny_model, windows

RATIO = 0.3


@pytest.fixture(scope="module")
def job() -> Job:
    return Job(windows(), RATIO)


def slim(method: str, job: Job, model_type: str = "llama", **changes) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A tiny model before and after."""
    dense = tiny_model(model_type, **changes)
    model = copy.deepcopy(dense)
    METHODS[method].apply(model, job)
    return dense, model


def inputs_of(model: PreTrainedModel, ids: Tensor, index: int, name: str) -> Tensor:
    """What an output matrix is given, ``(tokens, n)``."""
    seen: list[Tensor] = []
    linear = decoder_layers(model)[index].get_submodule(structures_of(model, "kv")[name].output)
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen)


def outputs_of(model: PreTrainedModel, ids: Tensor, index: int, module: str) -> Tensor:
    seen: list[Tensor] = []
    handle = (
        decoder_layers(model)[index]
        .get_submodule(module)
        .register_forward_hook(lambda _, __, output: seen.append(output.detach().flatten(0, 1)))
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen)


BASELINES = [name for name in COMPARED if not METHODS[name].ours and name != "shortgpt"]


@pytest.mark.parametrize(("method", "model_type"), [*((name, "llama") for name in BASELINES), ("flap", "phi3")])
def test_every_baseline_removes_the_share_asked_for(method, model_type, job):
    dense, model = slim(method, job, model_type)
    smallest_unit = 3 * dense.config.hidden_size / decoder_parameters(dense)
    loose = len(decoder_layers(dense)) if method == "obs-uniform" else 1  # equal layers step all together
    achieved = 1 - decoder_parameters(model) / decoder_parameters(dense)
    assert achieved == pytest.approx(RATIO, abs=loose * smallest_unit)
    with torch.no_grad():
        assert bool(model(windows(2)).logits.isfinite().all())


@pytest.mark.parametrize("method", ["flap", "llm-pruner", "wanda", "magnitude"])
def test_our_repair_lowers_the_error_of_the_first_layer_at_the_same_widths(method, job):
    dense, plain = slim(method, job)
    _, repaired = slim(method, Job(job.windows, RATIO, repair=True))
    if method != "flap":  # FLAP's bias counts as parameters: without it a little less goes
        assert layer_sizes(plain.config) == layer_sizes(repaired.config)
    index, module = 1, "self_attn.o_proj"
    wanted = outputs_of(dense, job.windows, index, module)
    errors = [(outputs_of(model, job.windows, index, module) - wanted).square().mean() for model in (plain, repaired)]
    assert errors[1] < errors[0]


def test_cutting_equals_zeroing_the_columns_of_the_dense_model(job):
    dense = tiny_model("phi3")
    kept = [{HEADS: torch.tensor([0, 2]), CHANNELS: torch.arange(index, 52, 3)} for index in range(4)]
    model, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    cut(model, kept, "kv", job)
    for layer, units in zip(decoder_layers(masked), kept):
        for name, structure in structures_of(dense, "kv").items():
            W = layer.get_submodule(structure.output).weight.data
            mask = torch.zeros(W.shape[1])
            mask[unit_rows(W.shape[1], structure.units(layer_sizes(dense.config)[0]), units[name])] = 1
            W *= mask
    ids = windows(3)
    torch.testing.assert_close(model(ids).logits, masked(ids).logits, rtol=1e-4, atol=1e-5)


def test_our_repair_of_a_given_choice_is_least_squares(job):
    dense = tiny_model("llama")
    kept = [{HEADS: torch.arange(3), CHANNELS: torch.arange(52)} for _ in range(4)]
    kept[0][HEADS] = torch.tensor([1, 2])
    model = copy.deepcopy(dense)
    cut(model, kept, "kv", Job(job.windows, RATIO, repair=True))
    x = inputs_of(dense, job.windows, 0, HEADS).double()
    H = x.T @ x / len(x)
    W = decoder_layers(dense)[0].self_attn.o_proj.weight.detach().double()
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    expected = reconstruct(W @ H, H, torch.arange(20, 60))
    repaired = decoder_layers(model)[0].self_attn.o_proj.weight.detach().double()
    torch.testing.assert_close(repaired, expected, rtol=1e-4, atol=1e-5)


def test_flap_scores_are_standardised_variance_times_squared_norm(job):
    model = tiny_model("llama")
    moments = input_moments(model, job)
    for index, name, module in ((0, HEADS, "self_attn.o_proj"), (2, CHANNELS, "mlp.down_proj")):
        x = inputs_of(model, job.windows, index, name).double()
        torch.testing.assert_close(moments[index][name].variance, x.var(0), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(moments[index][name].mean, x.mean(0), rtol=1e-4, atol=1e-6)
        W = decoder_layers(model)[index].get_submodule(module).weight.detach().double()
        column = [float(x[:, j].var() * (W[:, j] ** 2).sum()) for j in range(W.shape[1])]
        mean, std = torch.tensor(column).double().mean(), torch.tensor(column).double().std()
        units = 3 if name == HEADS else 52
        d = len(column) // units
        expected = [sum((column[u * d + k] - mean) / std for k in range(d)) / d for u in range(units)]
        scores = unit_scores(W, x.var(0), units)
        torch.testing.assert_close(scores, torch.stack(expected))


def test_flap_ranks_over_the_whole_model_and_leaves_one_unit_of_everything():
    generator = torch.Generator().manual_seed(0)
    scores = [
        {HEADS: torch.randn(3, generator=generator), CHANNELS: torch.randn(20, generator=generator)} for _ in "ab"
    ]
    scores[0][HEADS] -= 100
    costs = [{HEADS: 50, CHANNELS: 10}] * 2
    kept = rank_globally(scores, costs, 300, [{}, {}])
    removed = [(i, n) for i in (0, 1) for n in (HEADS, CHANNELS) for _ in range(len(scores[i][n]) - len(kept[i][n]))]
    assert sum(costs[i][name] for i, name in removed) == 300
    assert len(kept[0][HEADS]) == 1
    for index in (0, 1):
        values = scores[index][CHANNELS]
        gone = [u for u in range(20) if u not in kept[index][CHANNELS]]
        assert max(values[gone]) < min(values[kept[index][CHANNELS]])
    highest_gone = max(float(s[CHANNELS][u]) for s, k in zip(scores, kept) for u in range(20) if u not in k[CHANNELS])
    assert all(float(s[CHANNELS][u]) > highest_gone for s, k in zip(scores, kept) for u in k[CHANNELS])


def test_flap_bias_restores_the_mean_output_of_the_first_attention(job):
    dense, model = slim("flap", Job(job.windows, 0.5))
    assert layer_sizes(model.config) != layer_sizes(dense.config)
    changed = next(i for i, s in enumerate(layer_sizes(model.config)) if s["num_attention_heads"] < 6)
    before, after = decoder_layers(dense)[changed], decoder_layers(model)[changed]
    x = inputs_of(dense, job.windows, changed, HEADS)
    gone = before.self_attn.o_proj.weight.shape[1] - after.self_attn.o_proj.weight.shape[1]
    columns = [x.shape[1] - gone, gone]
    assert min(columns) > 0
    W, W_kept = before.self_attn.o_proj.weight, after.self_attn.o_proj.weight
    kept = [j for j in range(W.shape[1]) if any(torch.equal(W[:, j], W_kept[:, k]) for k in range(W_kept.shape[1]))]
    narrow = x[:, kept] @ W_kept.T + after.self_attn.o_proj.bias
    torch.testing.assert_close(narrow.mean(0), before.self_attn.o_proj(x).mean(0), rtol=1e-3, atol=1e-4)


def test_llm_pruner_importance_is_the_first_order_change_of_the_loss():
    """Without the absolute value it is the derivative of the loss by a common factor on all weights of a unit."""
    model, ids = tiny_model("phi3").double(), windows(2, 12)
    gradients = weight_gradients(model, ids)
    sizes = layer_sizes(model.config)[1]
    layer = decoder_layers(model)[1]
    signed = {name: layer.get_parameter(name).detach() * g for name, g in gradients[1].items()}
    for structure, unit in ((structures_of(model, "kv")[HEADS], 1), (structures_of(model, "kv")[CHANNELS], 17)):
        importance = unit_importance(signed, structure, structure.units(sizes), sizes)[unit]
        expected = central_difference(lambda s, t=structure, u=unit: loss_with_scaled_unit(model, ids, t, u, s))
        assert float(importance) == pytest.approx(expected, rel=1e-3)  # norms run in fp32


def central_difference(function: Callable[[float], float], step: float = 1e-2) -> float:
    """The derivative at 1 from two step sizes (Richardson), so that steps can be large: norms in fp32 are noise."""
    near, far = ((function(1 + h) - function(1 - h)) / (2 * h) for h in (step, 2 * step))
    return (4 * near - far) / 3


def loss_with_scaled_unit(model: PreTrainedModel, ids: Tensor, structure, unit: int, scale: float) -> float:
    """Scale a KV head (query, key and value rows and output columns) or a channel of phi3's layer 1."""
    scaled = copy.deepcopy(model)
    layer = decoder_layers(scaled)[1]
    with torch.no_grad():
        if structure.output == "mlp.down_proj":
            layer.mlp.down_proj.weight[:, unit] *= scale
            layer.mlp.gate_up_proj.weight[unit] *= scale
            layer.mlp.gate_up_proj.weight[52 + unit] *= scale
        else:  # 6 query heads on 3 KV heads of 8
            layer.self_attn.o_proj.weight[:, unit * 16 : unit * 16 + 16] *= scale
            layer.self_attn.qkv_proj.weight[unit * 16 : unit * 16 + 16] *= scale
            for start in (48, 72):
                layer.self_attn.qkv_proj.weight[start + unit * 8 : start + unit * 8 + 8] *= scale
        logits = scaled(input_ids=ids, use_cache=False).logits  # transformers' own loss is rounded to fp32
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def test_llm_pruner_leaves_the_first_and_last_layers_whole():
    shares = layer_shares(32, 0.2)
    assert [i for i, share in enumerate(shares) if share] == list(range(4, 30))
    assert sum(shares) / 32 == pytest.approx(0.2)
    _, model = slim("llm-pruner", Job(windows(), 0.3), num_hidden_layers=16)
    whole = [i for i, s in enumerate(layer_sizes(model.config)) if s["intermediate_size"] == 52]
    assert whole == [0, 1, 15]


def test_uniform_obs_takes_the_cheapest_channel_one_by_one_in_equal_layers(job):
    _, model = slim("obs-uniform", job)
    assert len({tuple(sizes.values()) for sizes in layer_sizes(model.config)}) == 1
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    x[:, 3] += x[:, 1]
    H = x.T @ x / 40
    live = list(range(8))
    for _ in range(4):

        def error(without: int, live=live) -> float:
            columns = torch.tensor([j for j in live if j != without])
            return relative_error(W, reconstruct(W @ H, H, columns), H, columns)

        live.remove(min(live, key=error))
    assert _channels(W, H, 4, generator).tolist() == live


def test_shortgpt_influence_is_one_minus_cosine_and_layers_are_skipped(job):
    dense, model = slim("shortgpt", Job(job.windows, 0.5), "gemma2")
    states: list[Tensor] = [None] * 5
    handles = [
        layer.register_forward_hook(lambda _, args, output, i=i: states.__setitem__(slice(i, i + 2), (args[0], output)))
        for i, layer in enumerate(decoder_layers(dense))
    ]
    with torch.no_grad():
        dense(job.windows)
    for handle in handles:
        handle.remove()
    expected = [
        1 - float(torch.cosine_similarity(states[i].double(), states[i + 1].double(), dim=-1).mean()) for i in range(4)
    ]
    influence = block_influence(dense, job)
    assert influence.tolist() == pytest.approx(expected, rel=1e-4)
    kept = sorted(sorted(range(4), key=lambda i: expected[i])[2:])
    assert layers_to_keep(influence, [10] * 4, 0.5) == kept
    assert model.config.layer_types == [dense.config.layer_types[i] for i in kept]
    skipped = [i for i in range(4) if i not in kept]
    for i in skipped:
        decoder_layers(dense)[i].register_forward_hook(lambda _, args, __: args[0])
    torch.testing.assert_close(model(windows(2)).logits, dense(windows(2)).logits)
    # Generation keeps a cache by the layer's index, which has to be counted anew.
    with torch.no_grad():
        assert model.generate(windows(1, 6), max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_shortgpt_takes_the_number_of_layers_nearest_to_the_ratio():
    influence = torch.tensor([0.9, 0.2, 0.1, 0.8])
    assert layers_to_keep(influence, [10] * 4, 0.3) == [0, 1, 3]
    assert layers_to_keep(influence, [10] * 4, 0.45) == [0, 3]
    assert layers_to_keep(influence, [10] * 4, 0.1) == [0, 1, 2, 3]
