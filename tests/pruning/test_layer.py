"""The loop over the layers against the same thing done by hand."""

import copy
from types import SimpleNamespace

import pytest
import torch

import slimgpt
from slimgpt.errors import NumericalError
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.slicing import unit_rows
from slimgpt.pruning.layer import gram_for
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.memory import Placement, free_bytes
from tests.models.families import tiny_model, windows

IDS = windows()


def inputs_of(model, module) -> torch.Tensor:
    """All inputs of a module over the calibration tokens, ``(tokens, n)``."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    return torch.cat(seen)


def closed_form(W, x, kept):
    H = x.T @ x / len(x)
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    return (W @ H)[:, kept] @ torch.linalg.inv(H[kept][:, kept])


@pytest.mark.parametrize("method", ["slimgpt", "paper"])
def test_every_repair_is_the_closed_form_on_the_stream_of_the_layers_before(method):
    """Layers before are slim, the attention before the FFN is slim, the matrix itself and all behind it are dense."""
    dense = tiny_model("llama").double()
    slim = copy.deepcopy(dense)
    report = slimgpt.prune(slim, None, 0.3, IDS, method=method, head_unit="kv", batch_size=5, device="cpu")
    mixed = copy.deepcopy(dense)  # becomes slim as the loop goes; zeroed columns stand for removed ones
    for layer in report.layers:
        before, after = mixed.model.layers[layer.layer], slim.model.layers[layer.layer]
        for name, path, units in (
            ("heads", "self_attn.o_proj", 3),
            ("channels", "mlp.down_proj", 52),
        ):
            linear = before.get_submodule(path)
            kept = unit_rows(linear.weight.shape[1], units, torch.tensor(layer.kept[name]))
            expected = closed_form(linear.weight.detach(), inputs_of(mixed, linear), kept)
            repaired = after.get_submodule(path).weight.detach()
            torch.testing.assert_close(repaired, expected, rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                linear.weight.zero_()
                linear.weight[:, kept] = repaired


def test_reported_errors_are_those_on_the_tokens():
    dense = tiny_model("llama").double()
    slim = copy.deepcopy(dense)
    report = slimgpt.prune(slim, None, 0.4, IDS, schedule="uniform", head_unit="kv", device="cpu")
    first = dense.model.layers[0].self_attn.o_proj
    x = inputs_of(dense, first)
    assert report.layers[0].kept["heads"] != [0, 1, 2]
    kept = unit_rows(x.shape[1], 3, torch.tensor(report.layers[0].kept["heads"]))
    full = x @ first.weight.detach().T
    difference = full - x[:, kept] @ slim.model.layers[0].self_attn.o_proj.weight.detach().T
    expected = float(difference.square().sum() / full.square().sum())
    assert report.layers[0].error["heads"] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "random"])
def test_baselines_leave_the_weights_and_repair_can_be_switched(method):
    dense = tiny_model("llama")
    plain, repaired = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"method": method, "schedule": "uniform", "head_unit": "kv", "device": "cpu"}
    report = slimgpt.prune(plain, None, 0.4, IDS, **options)
    other = slimgpt.prune(repaired, None, 0.4, IDS, repair=True, **options)
    kept = unit_rows(60, 3, torch.tensor(report.layers[0].kept["heads"]))
    W = dense.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(plain.model.layers[0].self_attn.o_proj.weight, W[:, kept])
    assert report.layers[0].kept["heads"] == other.layers[0].kept["heads"]
    assert other.layers[0].error["heads"] < report.layers[0].error["heads"]


@pytest.mark.parametrize("method", ["slimgpt", "paper", "wanda"])
def test_channels_that_never_fire_go_first(method):
    model = tiny_model("opt")
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data += 8
        layer.fc1.bias.data[:20] = -50  # ReLU leaves nothing of them
    report = slimgpt.prune(model, None, 0.3, IDS, method=method, schedule="uniform", head_unit="kv", device="cpu")
    for layer in report.layers:
        kept = layer.kept["channels"]
        assert 0 < len(kept) < 52
        assert sum(channel >= 20 for channel in kept) == min(len(kept), 32)


def test_wanda_scores_what_goes_in_without_damping():
    model = tiny_model("llama").double()
    linear = model.model.layers[0].self_attn.o_proj
    scores = linear.weight.detach().abs().sum(0) * inputs_of(model, linear).square().mean(0).sqrt()
    expected = scores.view(3, -1).sum(-1).topk(2).indices.sort().values.tolist()
    options = {"method": "wanda", "schedule": "uniform", "head_unit": "kv", "damping": 1e6}
    assert slimgpt.prune(model, None, 0.3, IDS, device="cpu", **options).layers[0].kept["heads"] == expected


def test_batch_size_changes_nothing_but_rounding():
    dense = tiny_model("qwen3")
    one, all_at_once = copy.deepcopy(dense), copy.deepcopy(dense)
    a = slimgpt.prune(one, None, 0.3, IDS, batch_size=1, device="cpu")
    b = slimgpt.prune(all_at_once, None, 0.3, IDS, batch_size=12, device="cpu")
    assert [layer.kept for layer in a.layers] == [layer.kept for layer in b.layers]
    with torch.no_grad():
        torch.testing.assert_close(one(IDS).logits, all_at_once(IDS).logits, rtol=1e-3, atol=1e-3)


def test_bad_weights_name_the_tensor():
    model = tiny_model("llama")
    model.model.layers[2].self_attn.q_proj.weight.data[1, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.2\.self_attn\.q_proj\.weight"):
        slimgpt.prune(model, None, 0.3, IDS, device="cpu")


def test_overflowing_activations_name_the_layer():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(3e38)
    with pytest.raises(NumericalError, match="layer 1"):
        slimgpt.prune(model, None, 0.3, IDS, device="cpu")


def test_too_few_tokens_without_damping_say_what_to_do():
    model = tiny_model("llama")
    with pytest.raises(NumericalError, match="raise --damping"):
        slimgpt.prune(model, None, 0.3, IDS[:1, :8], damping=0.0, device="cpu")


def test_an_interrupted_run_leaves_a_model_that_runs_and_saves(tmp_path):
    model = tiny_model("llama")

    def stop(report, _):
        if report.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimgpt.prune(model, None, 0.3, IDS, device="cpu", on_layer=stop)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert [sizes["intermediate_size"] for sizes in layer_sizes(model.config)] == widths
    assert widths[0] < 52
    assert widths[2:] == [52, 52]
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    slimgpt.save(model, None, None, tmp_path / "partial")


def test_half_precision_and_dtype():
    model = tiny_model("llama")
    frequencies = dict(model.named_buffers())["model.rotary_emb.inv_freq"].clone()
    report = slimgpt.prune(model, None, 0.3, IDS, dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(dict(model.named_buffers())["model.rotary_emb.inv_freq"], frequencies)
    assert report.plan.achieved == pytest.approx(0.3, abs=0.01)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_dropout_has_no_part_in_it():
    dense = tiny_model("gpt2", resid_pdrop=0.3, attn_pdrop=0.3)
    trained = copy.deepcopy(dense).train()
    options = {"calibration": IDS, "head_unit": "kv", "device": "cpu"}
    expected, report = slimgpt.prune(dense, None, 0.3, **options), slimgpt.prune(trained, None, 0.3, **options)
    assert [layer.kept for layer in report.layers] == [layer.kept for layer in expected.layers]
    assert [layer.error for layer in report.layers] == [layer.error for layer in expected.layers]
    assert trained.training
    assert all(layer.training for layer in trained.transformer.h)
    assert not dense.training


def test_processes_of_one_run_do_not_sum_into_the_same_file(tmp_path):
    placement = Placement(10**9, "device", "device", gram="file")
    runs = [
        ExecutionContext(torch.device("cpu"), placement, ranks=Ranks(rank, 2), scratch=tmp_path) for rank in range(2)
    ]
    one, other = (gram_for(4, run) for run in runs)
    one.add(torch.ones(3, 4))
    assert not other.sum.any()
    assert one.sum.all()


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8 * 10**6))
    alone = free_bytes(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert 0 < alone <= 8 * 10**6
    assert free_bytes(torch.device("cpu")) == alone // 8
