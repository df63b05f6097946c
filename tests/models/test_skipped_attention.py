"""Layers without attention: what they compute, what is saved, and what caches make of them.

The oracle is the dense model with zeros: a layer whose output matrix of attention is zero adds nothing, so the model
without that attention computes the same.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, StaticCache

import slimgpt
from slimgpt.errors import PlanError
from slimgpt.models import ARCHITECTURES
from slimgpt.models.architecture import Architecture
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.models.parameter_counts import attention_kept, describe
from slimgpt.models.slicing import output_matrix, unit_rows
from slimgpt.planning.plan import plan_of_widths
from slimgpt.planning.plan_file import to_toml
from tests.models.families import (
    REPRESENTATIVE,
    assert_loads_to_the_bit,
    in_a_process_without_slimgpt,
    plan_without,
    tiny_config,
    tiny_model,
    windows,
)
from tests.models.test_families import RELOAD

NAMES = [name for name, entry in ARCHITECTURES.items() if isinstance(entry, Architecture) and entry.attention]
IDS = windows(2, 24, seed=7)


def cases(*rows):
    """Cases of one family each; those that are not in the default run are slow."""
    return pytest.param(*rows, marks=[pytest.mark.families] + ([] if rows[0] in REPRESENTATIVE else [pytest.mark.slow]))


FAMILIES = [cases(name) for name in NAMES]


def prune(model, folder, **options):
    file = plan_without(model, folder)
    return slimgpt.prune(model, None, calibration=windows(), batch_size=5, device="cpu", plan=str(file), **options)


def layers_of(model):
    return model.get_submodule(lookup(model.config).layers)


def masked(dense, slim, report):
    """The dense model with zeros where columns, or whole attentions, are gone."""
    for layer, dense_layer, slim_layer in zip(report.layers, layers_of(dense), layers_of(slim)):
        for structure in lookup(dense.config).chosen(report.plan.head_unit):
            state = dense_layer.state_dict()
            W = output_matrix(state, structure)
            kept = layer.kept[structure.name]
            if not kept:
                W.zero_()
                if (bias := state.get(f"{structure.output}.bias")) is not None:
                    bias.zero_()
                continue
            columns = unit_rows(W.shape[1], structure.units(report.dense_sizes[layer.layer]), torch.tensor(kept))
            W_kept = output_matrix(slim_layer.state_dict(), structure)
            W.zero_()
            W[:, columns] = W_kept
    return dense


@pytest.fixture
def pruned(request, tmp_path):
    """A tiny model without attention in some layers, the dense one with zeros, and the report."""
    model = tiny_model(request.param)
    dense = copy.deepcopy(model)
    report = prune(model, tmp_path)
    return model, masked(dense, model, report), report


@pytest.mark.parametrize("pruned", FAMILIES, indirect=True)
def test_it_is_the_dense_model_with_zeros(pruned):
    model, dense, report = pruned
    gone = {index for index, sizes in enumerate(report.plan.layers) if not sizes["num_attention_heads"]}
    assert gone == set(range(4)) - attention_kept(model.config)
    assert gone
    with torch.no_grad():
        logits, expected = model(IDS).logits, dense(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert report.plan.parameters == sum(p.numel() for p in model.parameters())
    assert [dict(sizes) for sizes in report.plan.layers] == layer_sizes(model.config)
    module = lookup(model.config).attention[0]
    for index in gone:
        assert not list(layers_of(model)[index].get_submodule(module).parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("pruned", FAMILIES, indirect=True)
def test_generation_with_a_cache_is_that_of_the_model_with_zeros(pruned, implementation):
    model, dense, report = pruned
    gone = [index for index, sizes in enumerate(report.plan.layers) if not sizes["num_attention_heads"]]
    if implementation == "sdpa" and not dense._supports_sdpa:
        pytest.skip("the family has no such attention")
    for each in (model, dense):
        each.set_attn_implementation(implementation)
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(IDS), "do_sample": False}
    expected = dense.generate(IDS, **options, use_cache=False)
    generated = model.generate(IDS, **options, return_dict_in_generate=True)
    assert torch.equal(generated.sequences, expected)
    cache = generated.past_key_values
    assert cache.get_seq_length() == IDS.shape[1] + 11
    assert all(index >= len(cache.layers) or cache.layers[index].keys is None for index in gone)
    assert torch.equal(model.generate(IDS, **options, num_beams=3), dense.generate(IDS, **options, num_beams=3))
    ragged = torch.ones_like(IDS)
    ragged[1, :7] = 0  # padded on the left
    padded = {**options, "attention_mask": ragged}
    assert torch.equal(model.generate(IDS, **padded), dense.generate(IDS, **padded))


@pytest.mark.parametrize("pruned", [cases("llama"), cases("gemma2")], indirect=True)
@pytest.mark.parametrize("kind", ["dynamic", "dynamic without a config", "static"])
def test_caches_made_by_hand(pruned, kind):
    model, dense, _ = pruned
    if kind == "dynamic without a config" and model.config.model_type == "gemma2":
        pytest.skip("Gemma 2 needs a cache that knows its windows")

    def cache():
        if kind == "static":
            return StaticCache(config=model.config, max_cache_len=40)
        return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()

    logits, kept = [], cache()
    with torch.no_grad():
        for piece in IDS.split([9, 1, 14], dim=1):
            logits.append(model(piece, past_key_values=kept, use_cache=True).logits)
        expected = dense(IDS).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_folders_load_without_slimgpt_to_the_bit(tmp_path):
    expected, names = {}, ["llama", "gemma3_text", "qwen3"]
    for name in names:
        model = tiny_model(name)
        report = prune(model, tmp_path)
        slimgpt.save(model, None, report, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        assert sum(tensor.numel() for tensor in weights.values()) == report.plan.parameters
        per_layer = json.loads((tmp_path / name / "config.json").read_text())["per_layer_config"]
        assert per_layer["2"]["skip"] == ["attention"]
        assert "num_attention_heads" not in per_layer["2"]
        with torch.no_grad():
            expected[name] = model(IDS).logits
    outputs = in_a_process_without_slimgpt(tmp_path, RELOAD, IDS, [str(tmp_path / name) for name in names])
    for name in names:
        assert f"{name}.error" not in outputs, bytes(outputs[f"{name}.error"].tolist()).decode()
        assert torch.equal(outputs[f"{name}.logits"], expected[name])
        assert torch.equal(outputs[f"{name}.generate.True"], outputs[f"{name}.generate.False"])


def test_a_layer_that_differs_in_nothing_else(tmp_path):
    model = tiny_model("llama", attention_bias=False)
    sizes = [dict(layer) for layer in layer_sizes(model.config)]
    sizes[2] |= {"num_attention_heads": 0, "num_key_value_heads": 0}
    file = tmp_path / "plan.toml"
    file.write_text(to_toml(plan_of_widths(describe(model.config, model), sizes, "kv"), "llama"))
    report = slimgpt.prune(model, None, calibration=windows(), plan=str(file), device="cpu")
    slimgpt.save(model, None, report, tmp_path / "slim")
    assert_loads_to_the_bit(tmp_path / "slim", model, IDS)


def test_it_can_be_pruned_again(tmp_path):
    model = tiny_model("llama")
    first = prune(model, tmp_path)
    second = slimgpt.prune(model, None, 0.1, windows(), batch_size=5, device="cpu", allocation="sensitivity")
    assert second.plan.parameters < first.plan.parameters
    assert [layer["num_attention_heads"] == 0 for layer in second.plan.layers] == [False, True, True, True]
    slimgpt.save(model, None, second, tmp_path / "second")
    assert_loads_to_the_bit(tmp_path / "second", model, IDS)


@pytest.mark.parametrize(
    ("family", "layer", "reason"), [("llama", 0, "must keep its attention"), ("cohere2", 1, "must keep its attention")]
)
def test_what_must_stay_is_refused(family, layer, reason):
    model = tiny_model(family)
    sizes = [dict(each) for each in layer_sizes(model.config)]
    sizes[layer] |= {"num_attention_heads": 0, "num_key_value_heads": 0}
    with pytest.raises(PlanError, match=reason):
        plan_of_widths(describe(model.config, model), sizes, "kv")


def test_the_first_layer_of_every_kind_keeps_it():
    assert attention_kept(tiny_config("llama")) == {0}
    assert attention_kept(tiny_config("gemma2")) == {0, 1}
