"""What must hold for every family: replay, pruning as zeroing, and reloading without slimgpt.

The default run has the families of ``REPRESENTATIVE``; ``pytest -m families`` has
all of them.
"""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

import slimgpt
from slimgpt.errors import PlanError, UnsupportedFamilyError, UsageError
from slimgpt.layerwise.capture import capture, run_layer
from slimgpt.layerwise.partial_forward import run_to, run_with
from slimgpt.models.families import ffn, grouped
from slimgpt.models.lookup import layer_sizes, lookup
from slimgpt.models.slicing import output_matrix, unit_rows
from slimgpt.runtime.activation_store import ActivationStore
from tests.models.families import (
    HYBRIDS,
    NAMES,
    REPRESENTATIVE,
    assert_loads_to_the_bit,
    in_a_process_without_slimgpt,
    tiny_config,
    tiny_model,
    windows,
)


def architecture(name):
    """The description of a tiny model's family."""
    return lookup(tiny_config(name))


def units(name):
    """The ways to remove heads; ``auto`` where heads stay."""
    return [unit for unit in ("kv", "query") if architecture(name).find(unit)] or ["auto"]


def ratio(name):
    """What the FFN alone can give up, or a third."""
    return 0.3 if units(name) != ["auto"] and name not in HYBRIDS else 0.12


def cases(*rows):
    """Cases of one family each, marked; those that are not in the default run are slow as well."""
    marks = [pytest.mark.families] + ([] if rows[0] in REPRESENTATIVE else [pytest.mark.slow])
    return pytest.param(*rows, marks=marks)


FAMILIES = [cases(name) for name in NAMES]
UNITS = [cases(name, unit) for name in NAMES for unit in units(name)]
FORMS = ("layers", "again", "uniform")
IDS = windows(2, 24, seed=7)

RELOAD = """
import json, sys
sys.modules["slimgpt"] = None  # importing it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
out, ids, outputs = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), {}
def reload(folder):
    name, trust = folder.rsplit("/", 1)[1], not folder.endswith("uniform")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust, attn_implementation="eager").eval()
    with torch.no_grad():
        outputs[f"{name}.logits"] = model(ids).logits
        for cache in (True, False):
            outputs[f"{name}.generate.{cache}"] = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=cache
            )
    outputs[f"{name}.stock"] = torch.tensor(type(model).__module__.startswith("transformers.models."))
for folder in sys.argv[3:]:
    try:
        reload(folder)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".encode() or b"?"
        outputs[folder.rsplit("/", 1)[1] + ".error"] = torch.tensor(list(text), dtype=torch.uint8)
save_file({key: value.contiguous() for key, value in outputs.items()}, out)
"""


def prune(model, **options):
    """Widths by the schedule: every structure of every layer loses something."""
    options = {
        "ratio": 0.3,
        "calibration": windows(),
        "batch_size": 5,
        "device": "cpu",
        "allocation": "schedule",
        **options,
    }
    return slimgpt.prune(model, None, **options)


def layers_of(model):
    return model.get_submodule(lookup(model.config).layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_lost_is_divided_among_the_structures(name):
    report = prune(tiny_model(name), ratio=ratio(name), allocation="sensitivity")
    allocation = report.allocation
    assert len(allocation["contributions"]) >= len(report.layers) // 2
    assert sum(part["cost"] for part in allocation["contributions"]) == pytest.approx(allocation["divergence"], rel=0.2)
    assert report.plan.achieved == pytest.approx(ratio(name), abs=0.01)


@pytest.mark.parametrize("name", FAMILIES)
def test_replaying_the_layers_is_the_models_own_forward(name):
    model = tiny_model(name)
    layers = layers_of(model)
    after = []
    hook = layers[-1].register_forward_hook(lambda _, __, output: after.append(output))
    with torch.no_grad():
        model(IDS, use_cache=False)
        hook.remove()
        expected = after[0][0] if isinstance(after[0], tuple) else after[0]
        stream = capture(model, layers, IDS, 1, ActivationStore("device", torch.device("cpu")))
        assert len(stream) == 2
        for number in range(2):
            hidden = stream.hidden.get(number)
            for index, layer in enumerate(layers):
                kwargs = stream.arguments[number][index]
                whole = run_layer(layer, hidden, kwargs)
                results = {}
                for structure in architecture(name).chosen("kv"):
                    if structure.output not in dict(layer.named_modules()):
                        continue
                    part = run_with(layer, results, hidden, kwargs, until=structure.output)
                    results[part.module] = part.wrap_output(layer.get_submodule(structure.output)(part.inputs))
                assert torch.equal(run_with(layer, results, hidden, kwargs), whole)
                hidden = whole
            torch.testing.assert_close(hidden[0], expected[number], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(("name", "unit"), UNITS)
def test_slim_model_is_the_dense_one_with_pruned_columns_zeroed(name, unit, dtype, tolerance):
    model = tiny_model(name).to(dtype)
    try:
        with torch.no_grad():
            model(IDS)
    except RuntimeError as error:
        assert dtype == torch.float64
        pytest.skip(f"the class does not run in fp64: {error}")
    masked = copy.deepcopy(model)
    report = prune(model, head_unit=unit, ratio=ratio(name))
    assert [dict(s) for s in report.plan.layers] == layer_sizes(model.config)
    for layer, dense, slim in zip(report.layers, layers_of(masked), layers_of(model)):
        for structure in architecture(name).chosen(unit):
            if structure.name not in layer.kept:
                continue
            W = output_matrix(dense.state_dict(), structure)
            W_kept = output_matrix(slim.state_dict(), structure)
            count = structure.units(report.dense_sizes[layer.layer])
            columns = unit_rows(W.shape[1], count, torch.tensor(layer.kept[structure.name]))
            W.zero_()
            W[:, columns] = W_kept
    with torch.no_grad():
        logits, expected = model(IDS).logits, masked(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert report.layers[-1].parameters < report.layers[-1].parameters_before
    assert report.plan.parameters == sum(p.numel() for p in model.parameters())
    if unit != "auto":  # not only the first ones stay, which a wrong description could survive
        kept = [layer.kept["heads"] for layer in report.layers if "heads" in layer.kept]
        assert any(heads != list(range(len(heads))) for heads in kept) or name in HYBRIDS


def save_form(name, form, folder):
    """Prune a tiny model, save it in one form, and return its logits and the report."""
    model = tiny_model(name)
    unit = units(name)[0] if form == "layers" else "auto"
    report = prune(model, uniform=form == "uniform", head_unit=unit, ratio=ratio(name))
    if form == "again":
        first, report = report, prune(model, ratio=ratio(name) / 2)
        assert report.plan.parameters < first.plan.parameters
    slimgpt.save(model, None, report, folder)
    with torch.no_grad():
        return model(IDS).logits, report


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, request):
    """Families pruned and saved in every form, and what a process without slimgpt computes from them.

    An error of one family is kept for its own tests.
    """
    root = tmp_path_factory.mktemp("families")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "reloaded" in item.fixturenames
    }
    expected, reports, errors = {}, {}, {}
    for name, form in itertools.product(sorted(chosen), FORMS):
        folder = f"{name.replace('/', '-')}-{form}"
        try:
            expected[folder], reports[folder] = save_form(name, form, root / folder)
        except Exception as error:
            errors[folder] = error
    outputs = in_a_process_without_slimgpt(root, RELOAD, IDS, [str(root / folder) for folder in expected])
    return root, expected, reports, errors, outputs


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_folder_loads_without_slimgpt_to_the_bit(name, form, reloaded):
    root, expected, reports, errors, outputs = reloaded
    folder = f"{name.replace('/', '-')}-{form}"
    if isinstance(errors.get(folder), PlanError) and form == "uniform" and architecture(name).resized:
        pytest.skip("its config says no FFN width, so that no stock class holds another one")
    if isinstance(errors.get(folder), PlanError) and form == "uniform" and architecture(name).times_ffn:
        pytest.skip("its layers differ in width before they are pruned")
    if folder in errors:
        raise errors[folder]
    if f"{folder}.error" in outputs:
        pytest.fail(bytes(outputs[f"{folder}.error"].tolist()).decode())
    assert torch.equal(outputs[f"{folder}.logits"], expected[folder])
    assert torch.equal(outputs[f"{folder}.generate.True"], outputs[f"{folder}.generate.False"])
    assert bool(outputs[f"{folder}.stock"]) == (form == "uniform")
    assert (root / folder / "modeling_slim.py").is_file() == (form != "uniform")
    saved = json.loads((root / folder / "config.json").read_text())
    own = {field for layer in saved.get("per_layer_config", {}).values() for field in layer}
    assert form != "uniform" or own <= architecture(name).varying  # what differs in the dense model, too
    weights = load_file(root / folder / "model.safetensors")
    model = tiny_model(name)
    buffers = set(model.state_dict()) - {parameter for parameter, _ in model.named_parameters(remove_duplicate=False)}
    count = sum(tensor.numel() for key, tensor in weights.items() if key not in buffers)
    assert count == reports[folder].plan.parameters


def test_a_llama_whose_heads_do_not_divide_the_hidden_size_becomes_a_mistral(tmp_path):
    options = {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 8}
    model = tiny_model("llama", **options, attention_bias=False, mlp_bias=False)
    report = prune(model, uniform=True, ratio=0.2)
    assert 56 % report.plan.layers[0]["num_attention_heads"] != 0
    slimgpt.save(model, None, report, tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    assert config["sliding_window"] is None


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_slim_model_can_be_pruned_again(family, tmp_path):
    model = tiny_model(family)
    first = prune(model, ratio=0.2)
    slimgpt.save(model, None, first, tmp_path / "first")
    second = prune(model, ratio=0.2)
    assert second.plan.parameters < first.plan.parameters
    assert abs(second.plan.achieved - 0.2) < 0.01
    slimgpt.save(model, None, second, tmp_path / "second")
    assert_loads_to_the_bit(tmp_path / "second", model, IDS)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_attention_implementation_reaches_the_layers(family):
    model = tiny_model(family)
    prune(model)
    with torch.no_grad():
        eager = model(IDS).logits
        model.set_attn_implementation("sdpa")
        assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}
        torch.testing.assert_close(model(IDS).logits, eager, rtol=1e-4, atol=1e-4)


def test_run_to_stops_before_the_output_matrix():
    model = tiny_model("llama")
    stream = capture(model, model.model.layers, IDS, 2, ActivationStore("device", torch.device("cpu")))
    seen = []
    linear = model.model.layers[0].self_attn.o_proj
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        run_layer(model.model.layers[0], stream.hidden.get(0), stream.arguments[0][0])
        part = run_to(model.model.layers[0], "self_attn.o_proj", stream.hidden.get(0), stream.arguments[0][0])
    assert torch.equal(part.inputs, seen[0])
    assert len(seen) == 1


def test_a_family_can_be_described_without_touching_the_package(registry):
    """As docs/adding-a-family.md has it."""
    del registry["arcee"]
    with pytest.raises(UnsupportedFamilyError, match=r"(?s)nobody has shown|has described it.*mlp\.up_proj: Linear"):
        prune(tiny_model("arcee"))
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    arcee = slimgpt.Architecture((*grouped("self_attn.o_proj", *qkv), ffn("mlp.down_proj", "mlp.up_proj")))
    slimgpt.register("arcee", arcee)
    model = tiny_model("arcee")
    report = prune(model)
    assert report.plan.parameters == sum(p.numel() for p in model.parameters())
    with pytest.raises(UsageError, match="described already"):
        slimgpt.register("arcee", arcee)


@pytest.mark.parametrize(("name", "reason"), [("olmo2", "over all heads at once"), ("bloom", "ALiBi")])
def test_heads_that_must_stay_are_refused_with_the_reason(name, reason):
    with pytest.raises(PlanError, match=f"heads of '{name}' cannot be removed: .*{reason}"):
        prune(tiny_model(name), head_unit="kv", ratio=0.1)
