"""What must hold for every mixture of experts: its arithmetic, pruning as zeroing and masking, and reloading."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

import slimgpt
from slimgpt.layerwise.capture import capture, run_layer
from slimgpt.layerwise.partial_forward import arguments_of
from slimgpt.models import EXPERTS, Experts
from slimgpt.models.build import empty_model
from slimgpt.models.expert_tensors import down_matrix, expert_output, intermediate, routed
from slimgpt.models.loading import load_config
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.models.slicing import unit_rows
from slimgpt.models.source import locate
from slimgpt.models.streaming import weights_mismatch
from slimgpt.models.weight_conversion import ConvertedFiles
from slimgpt.pruning.experts import ExpertsPruner
from slimgpt.pruning.report import mask_of, units_of
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.solver.experts import Routing, contributions
from tests.models.families import assert_loads_to_the_bit, in_a_process_without_slimgpt, tiny_config, windows
from tests.models.mixtures import OWN_OF_MIXTURES, tiny_mixture
from tests.models.test_families import RELOAD

NAMES = list(OWN_OF_MIXTURES)
REPRESENTATIVE = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h")
"""One of every layout; the default run has these, `pytest -m families` all."""


def cases(*rows):
    """Cases of one family each, marked; those that are not in the default run are slow as well."""
    marks = [pytest.mark.families] + ([] if rows[0] in REPRESENTATIVE else [pytest.mark.slow])
    return pytest.param(*rows, marks=marks)


FAMILIES = [cases(name) for name in NAMES]
BY_LAYER_ONLY = ("minimax", "granitemoehybrid/experts", "nemotron_h", "gemma4_text/experts", "kolibri1")
"""Families whose layers differ in kind, or whose config does not take another number of experts for all layers."""
PARTLY_IN_FP32 = ("beam", "nemotron_h")
"""Families whose experts compute their gate, or add up their outputs, in fp32 whatever the model's type is."""
SHARES = (0.0, 0.5, 1.0)
IDS = windows(2, 24, seed=7)


def prune(model, **options):
    options = {"ratio": 0.3, "calibration": windows(), "batch_size": 5, "device": "cpu", **options}
    return slimgpt.prune(model, None, **options)


def double(family, **changes):
    """A model in fp64; the routers compute in fp32 or fp64, as their families have it."""
    model = tiny_mixture(family, **changes).double()
    model.set_experts_implementation("eager")
    return model


def sparse_layers(model):
    """The description of the experts, and the layers that have them."""
    experts = lookup(model.config).experts
    layers = [layer for layer in model.model.layers if experts.key in layer.state_dict()]
    assert layers
    return experts, layers


def expert_calls(model, ids):
    """Every layer with experts, and the tokens, experts and weights that these are called with."""
    experts, _ = sparse_layers(model)
    stream = capture(model, model.model.layers, ids, len(ids), ActivationStore("device", torch.device("cpu")))
    hidden = stream.hidden.get(0)
    for index, layer in enumerate(model.model.layers):
        run = partial(run_layer, layer, hidden, stream.arguments[0][index])
        if experts.key in layer.state_dict():
            yield layer, arguments_of(layer, experts.module, run)
        hidden = run()


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_one_by_one_are_the_modules_own_forward(name):
    model = double(name)
    experts, layers = sparse_layers(model)
    with torch.no_grad():
        for layer, arguments in expert_calls(model, IDS):
            module = layer.get_submodule(experts.module)
            output = partial(expert_output, module, experts)
            count = len(layer.state_dict()[experts.key])
            tokens, chosen, weights = routed(arguments, experts, count)
            routing = Routing(chosen, weights, count)
            parts = contributions(routing, tokens, chosen.shape[1], tokens.shape[1], output)
            tolerance = 1e-6 if name in PARTLY_IN_FP32 else 1e-12
            whole = module(*arguments).view(-1, *tokens.shape).sum(0)
            torch.testing.assert_close(parts.sum(1), whole, rtol=tolerance, atol=tolerance)
            layers.remove(layer)
    assert not layers


@pytest.fixture
def silenced(monkeypatch):
    """Makes the logits of some experts -inf, whatever the family's router does with its logits."""
    routers: list[tuple[torch.Tensor, list[int]]] = []
    linear = torch.nn.functional.linear

    def masking(x, weight, bias=None):
        logits = linear(x, weight, bias)
        for router, gone in routers:
            if weight.shape == router.shape and torch.equal(weight, router.to(weight)):
                logits[..., gone] = -torch.inf
        return logits

    monkeypatch.setattr(torch.nn.functional, "linear", masking)
    return routers


@pytest.mark.parametrize(("name", "share"), [cases(name, share) for name in NAMES for share in SHARES])
def test_slim_model_is_the_dense_one_with_channels_zeroed_and_routers_masked(name, share, silenced):
    model = double(name)
    masked = copy.deepcopy(model)
    experts, _ = sparse_layers(model)
    ratio = 0.4 if lookup(model.config).find("kv") else 0.3
    report = prune(model, ratio=ratio, schedule="uniform", whole_experts=share)
    assert [dict(s) for s in report.plan.layers] == layer_sizes(model.config)
    assert report.plan.parameters == sum(p.numel() for p in model.parameters())
    gone = 0
    for layer, dense, slim in zip(report.layers, masked.model.layers, model.model.layers):
        sizes = report.dense_sizes[layer.layer]
        for structure in lookup(model.config).chosen(report.plan.head_unit):
            if isinstance(structure, Experts) or structure.key not in dense.state_dict():
                continue
            W = dense.get_submodule(structure.output).weight.data
            columns = unit_rows(W.shape[1], structure.units(sizes), torch.tensor(layer.kept[structure.name]))
            W.zero_()
            W[:, columns] = slim.get_submodule(structure.output).weight.data
        if layer.experts is None:
            assert EXPERTS not in sizes
            continue
        removed = sorted(set(range(sizes[EXPERTS])) - set(layer.experts.kept))
        gone += len(removed)
        router = next(iter(dense.get_submodule(experts.router).parameters()))
        silenced.append((router, removed))
        for name, tensor in dense.state_dict().items():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                tensor.view(-1)[removed] = -torch.inf
        dense_state, slim_state = dense.state_dict(), slim.state_dict()
        for position, expert in enumerate(layer.experts.kept):
            W, bias = down_matrix(dense_state, experts, expert)
            W_kept, bias_kept = down_matrix(slim_state, experts, position)
            masks = layer.experts.channels
            channels = units_of(masks[position]) if masks else list(range(sizes["intermediate_size"]))
            assert len(channels) == layer.sizes["intermediate_size"]
            W.zero_()
            W[:, channels] = W_kept
            if bias is not None:
                bias.copy_(bias_kept)
    assert (gone > 0) == (share > 0)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, masked(IDS).logits, rtol=1e-6, atol=1e-6)


def forms(family):
    """Layers of different widths; equal ones too, where every layer has experts."""
    kinds = {tuple(sizes) for sizes in layer_sizes(tiny_config(family))}
    return ("layers",) if len(kinds) > 1 or family in BY_LAYER_ONLY else ("layers", "uniform")


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, request):
    """The families asked for, pruned and saved both ways, and what a process without slimgpt makes of the folders."""
    root = tmp_path_factory.mktemp("mixtures")
    expected, reports, buffers = {}, {}, {}
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "reloaded" in item.fixturenames
    }
    for family in sorted(asked):
        for form in forms(family):
            model = tiny_mixture(family)
            name = f"{family.replace('/', '-')}-{form}"
            try:
                report = prune(model, uniform=form == "uniform", whole_experts=0.6)
                slimgpt.save(model, None, report, root / name)
            except Exception as error:  # kept for the test of this family
                reports[name] = error
                continue
            with torch.no_grad():
                expected[name] = model(IDS).logits
            reports[name] = report
            parameters = dict(model.named_parameters())
            held = {key: value for key, value in model.state_dict().items() if key not in parameters}
            buffers[name] = sum(value.numel() for key, value in held.items() if not key.startswith("lm_head"))
    outputs = in_a_process_without_slimgpt(root, RELOAD, IDS, [str(root / name) for name in expected])
    return root, expected, reports, buffers, outputs


@pytest.mark.parametrize(("name", "form"), [cases(name, form) for name in NAMES for form in forms(name)])
def test_folder_loads_without_slimgpt_to_the_bit(name, form, reloaded):
    root, expected, reports, buffers, outputs = reloaded
    name = f"{name.replace('/', '-')}-{form}"
    if isinstance(reports[name], Exception):
        raise reports[name]
    assert f"{name}.error" not in outputs, bytes(outputs[f"{name}.error"].tolist()).decode()
    assert torch.equal(outputs[f"{name}.logits"], expected[name])
    assert torch.equal(outputs[f"{name}.generate.True"], outputs[f"{name}.generate.False"])
    assert bool(outputs[f"{name}.stock"]) == (form == "uniform")
    weights = load_file(root / name / "model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) - buffers[name] == reports[name].plan.parameters
    written = json.loads((root / name / "slimgpt.json").read_text())
    sparse = [layer["experts"] for layer in written["layers"] if layer["experts"] is not None]
    assert sparse
    assert all(len(layer["tokens"]) == len(layer["kept"]) for layer in sparse)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_implementation_of_experts_reaches_the_layers(family):
    model = tiny_mixture(family)
    prune(model)
    with torch.no_grad():
        grouped = model(IDS).logits
        model.set_experts_implementation("eager")
        experts, layers = sparse_layers(model)
        assert {layer.get_submodule(experts.module).config._experts_implementation for layer in layers} == {"eager"}
        torch.testing.assert_close(model(IDS).logits, grouped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_slim_mixture_can_be_pruned_again(family, tmp_path):
    model = tiny_mixture(family)
    first = prune(model, ratio=0.2, whole_experts=0.5)
    second = prune(model, ratio=0.2, whole_experts=0.5)
    assert second.plan.parameters < first.plan.parameters
    assert abs(second.plan.achieved - 0.2) < 0.03  # steps are large in a model this small
    slimgpt.save(model, None, second, tmp_path / "second")
    assert_loads_to_the_bit(tmp_path / "second", model, IDS)


def test_an_expert_that_saw_too_few_tokens_is_repaired_on_tokens_of_the_whole_layer():
    model = double("gpt_oss")
    experts, layers = sparse_layers(model)
    for layer in layers:
        layer.get_submodule(experts.router).bias.data[2] = -50.0  # nobody goes there
    dense = copy.deepcopy(model)
    report = prune(model, ratio=0.3, schedule="uniform")
    first = report.layers[0]
    assert first.experts.tokens[2] == 0
    width = report.dense_sizes[0]["intermediate_size"]
    assert first.experts.fallback == [e for e, n in enumerate(first.experts.tokens) if n < width]
    with torch.no_grad():
        _, (tokens, _, _) = next(expert_calls(dense, windows()))
        dense_experts, slim_experts = (m.model.layers[0].get_submodule(experts.module) for m in (dense, model))
        wanted = expert_output(dense_experts, experts, 2, tokens)
        repaired = expert_output(slim_experts, experts, 2, tokens)
        bias = dense.model.layers[0].state_dict()[f"{experts.key}_bias"][2]
        channels = units_of(first.experts.channels[2])
        W, _ = down_matrix(dense.model.layers[0].state_dict(), experts, 2)
        sliced = intermediate(dense_experts, experts, 2, tokens)[:, channels] @ W[:, channels].T + bias
    assert (repaired - wanted).norm() < 0.95 * (sliced - wanted).norm()  # without a Hessian they are equal


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_reap_drops_the_experts_of_least_saliency_and_touches_nothing_else(family):
    """The saliency by hooks on the first layer of the dense model; what stays has the dense model's own numbers."""
    model = double(family)
    dense = copy.deepcopy(model)
    report = prune(model, ratio=0.3, method="reap", schedule="uniform", round_to=40)
    experts, _ = sparse_layers(dense)
    first = report.layers[0]
    with torch.no_grad():
        layer, arguments = next(expert_calls(dense, windows()))
    module = layer.get_submodule(experts.module)
    count = report.dense_sizes[0][EXPERTS]
    tokens, chosen, weights = routed(arguments, experts, count)
    saliency = []
    with torch.no_grad():
        for expert in range(count):
            rows, slots = (chosen == expert).nonzero(as_tuple=True)
            norms = expert_output(module, experts, expert, tokens[rows]).norm(dim=-1)
            saliency.append(float((weights[rows, slots] * norms).mean()) if len(rows) else 0.0)
    kept = report.plan.layers[0][EXPERTS]
    assert kept < count
    assert first.experts.kept == sorted(sorted(range(count), key=saliency.__getitem__)[-kept:])
    assert set(first.experts.scales) == {1.0}
    slim, full = model.model.layers[0].state_dict(), dense.model.layers[0].state_dict()
    for name, tensor in slim.items():
        expected = full[name]
        if name.startswith((f"{experts.module}.", f"{experts.router}.")):
            expected = expected[first.experts.kept]
        assert torch.equal(tensor, expected), name


def test_masks_hold_the_units_they_were_made_from():
    for units in ([], [0], [3, 4, 17], list(range(40))):
        assert units_of(mask_of(units, 40)) == units
        assert len(mask_of(units, 40)) == 10


@pytest.fixture
def mixtral_folder(tmp_path, tokenizer):
    """A tiny Mixtral as its checkpoints are: every expert by itself, in shards that cut through layers."""
    folder = tmp_path / "mixtral"
    tiny_mixture("mixtral").save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(folder):
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    return weights


def test_repaired_matrices_of_experts_lie_in_memory_as_a_resumed_run_reads_them(tokenizer, text_file, monkeypatch):
    """Row by row: a product's last bit can change with the order, and with it the bytes of all later layers."""
    strides = []
    add_output = ExpertsPruner._add_output

    def recorded(self, number, expert, inputs, columns, W, outputs):
        strides.append(W.stride() == (W.shape[1], 1))
        add_output(self, number, expert, inputs, columns, W, outputs)

    monkeypatch.setattr(ExpertsPruner, "_add_output", recorded)
    options = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu", "batch_size": 3}
    slimgpt.prune(tiny_mixture("mixtral"), tokenizer, calibration=str(text_file), **options)
    assert strides
    assert all(strides)


def test_a_folder_of_separate_experts_is_streamed_resumed_and_written_in_its_form(mixtral_folder, text_file, tmp_path):
    options = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu", "batch_size": 3, "uniform": True}
    options |= {"calibration": str(text_file), "whole_experts": 1.0}
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in weights_of(mixtral_folder)
    source = locate(str(mixtral_folder))
    config = load_config(source)
    empty = empty_model(config)
    assert weights_mismatch(empty, ConvertedFiles(mixtral_folder, empty)) is None  # so that it is streamed

    report = slimgpt.prune_folder(str(mixtral_folder), tmp_path / "whole", **options)
    model, tokenizer = slimgpt.load(str(mixtral_folder))
    prune_options = {key: value for key, value in options.items() if key != "calibration"}
    slimgpt.prune(model, tokenizer, calibration=str(text_file), **prune_options)
    slim, _ = slimgpt.load(str(tmp_path / "whole"))
    assert type(slim).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(slim(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    left = report.plan.layers[0][EXPERTS]
    names = weights_of(tmp_path / "whole")
    assert f"model.layers.3.block_sparse_moe.experts.{left - 1}.w2.weight" in names
    assert f"model.layers.3.block_sparse_moe.experts.{left}.w2.weight" not in names

    def stop(layer, _):
        if layer.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimgpt.prune_folder(str(mixtral_folder), tmp_path / "again", on_layer=stop, **options)
    slimgpt.prune_folder(str(mixtral_folder), tmp_path / "again", resume=True, **options)
    first, again = (tmp_path / name / "model.safetensors" for name in ("whole", "again"))
    assert first.read_bytes() == again.read_bytes()
