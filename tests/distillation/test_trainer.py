"""The training after pruning, against PyTorch's own gradients and Adam through the whole model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

import slimgpt
from slimgpt.config import make_config
from slimgpt.distillation import sharded_adam
from slimgpt.distillation import trainer as distillation
from slimgpt.distillation.data import _equal_batches, build_distillation_data
from slimgpt.distillation.schedule import learning_rate, passes_to_distill, tokens_to_distill, trainable_tokens
from slimgpt.distillation.trainer import Distillation
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.build import decoder_layers
from slimgpt.models.lookup import lookup
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.in_place import prune_model
from slimgpt.runtime.memory import Placement
from slimgpt.runtime.thresholds import other_thresholds, thresholds
from tests.models.families import tiny_model, windows

IDS = windows(24, 24)
CONFIG = make_config(ratio=0.4, batch_size=3, allocation="schedule")
OPTIONS = {"ratio": 0.4, "calibration": IDS, "batch_size": 3, "device": "cpu", "allocation": "schedule"}


@pytest.fixture(autouse=True)
def short_steps():
    with other_thresholds(step_tokens=144):  # six windows, which a CPU runs one by one
        yield


def run(place: str = "device", budget: int = 10**12) -> ExecutionContext:
    return ExecutionContext(torch.device("cpu"), Placement(budget, place, place))


def case(family: str, place: str = "device", tokens: int = 300, allocation: str = "schedule", budget: int = 10**12):
    """A dense and a pruned model in fp64, and the training between them."""
    dense = tiny_model(family).double()
    plan = plan_for(dense.config, CONFIG, describe(dense.config, dense))
    slim = copy.deepcopy(dense)
    for _ in prune_model(slim, IDS, plan, CONFIG, run()):
        pass
    config = replace(CONFIG, allocation=allocation)
    lesson = build_distillation_data(dense, decoder_layers(dense).__getitem__, IDS, tokens, config, run(place))
    return dense, slim, Distillation(slim, decoder_layers(slim).__getitem__, plan, lesson, run(place, budget))


def divergence(model, dense, ids):
    log_p, log_q = (m(ids).logits[:, 1:].log_softmax(-1) for m in (dense, model))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def said_by(model, ids):
    """The cross-entropy with the tokens that follow; the last position has none."""
    log_q = model(ids).logits.log_softmax(-1)[:, :-1]
    return -log_q.gather(-1, ids[:, 1:, None])[:, 1:, 0].sum()


FAMILIES = ("llama", "gemma2", "phi3", "gpt_neox", "gpt2")


@pytest.mark.parametrize(
    ("family", "tokens", "others"),
    [
        *((name, 300, 0.0) for name in FAMILIES),
        *((name, 300, 0.25) for name in FAMILIES),
        ("llama", 600, 0.0),
        ("gemma4_text/shared", 600, 0.25),  # gradients also go through keys and values that later layers read
    ],
)
def test_it_is_adam_on_divergence_and_text_through_the_whole_model(family, tokens, others):
    """If tokens are wanted that are not there (432 are), the dense model's come first, and say nothing of their own.
    A search trains all matrices of the layers, those that are not named below at a quarter of the rate."""
    dense, slim, training = case(family, tokens=tokens, allocation="search" if others else "schedule")
    lesson = training.data
    assert lesson.other_matrices_lr == others
    steps = lesson.steps
    assert [len(step) for step in steps] == [6] * (2 if tokens == 300 else 4)
    assert lesson.count(range(lesson.held_out)) == 144
    mirror = copy.deepcopy(slim)
    info = training()

    mirror.requires_grad_(False)
    architecture = lookup(dense.config)
    keys = {s.key for s in architecture.chosen("kv")}
    inner = f"{architecture.layers}."
    names = [n for n, _ in mirror.named_parameters() if any(n.endswith(f".{key}") for key in keys)]
    assert len(names) == len(keys) * len(decoder_layers(mirror))
    norms = ("norm", "ln_1", "ln_2")
    names += [n for n, _ in mirror.named_parameters() if n.startswith(inner) and any(norm in n for norm in norms)]
    # Of Gemma 4's four layers two have a norm of keys.
    per_layer = {"llama": 4, "gemma2": 6, "phi3": 4, "gpt_neox": 6, "gpt2": 6, "gemma4_text/shared": 7.5}[family]
    assert len(names) == per_layer * len(decoder_layers(mirror))
    scales = dict.fromkeys(names, 1.0)
    if others:
        matrices = [n for n, p in mirror.named_parameters() if n.startswith(inner) and p.ndim == 2]
        scales = {**dict.fromkeys(matrices, others), **scales}
        assert len(scales) > len(names)
    groups = []
    for name, scale in scales.items():
        weight = mirror.get_parameter(name).requires_grad_()
        groups.append({"params": [weight], "scale": scale * float(weight.detach().square().mean().sqrt())})
    adam = torch.optim.Adam(groups, lr=0.0, betas=sharded_adam.BETAS, eps=0.0)
    curve = []
    for number, step in enumerate(steps):
        adam.zero_grad()
        losses = [divergence(mirror, dense, lesson.ids[b]) for b in step]
        loss = torch.cat([part.flatten() for part in losses]).sum()
        text = sum(said_by(mirror, lesson.ids[b]) for b in step)
        heeded = number >= 1 or tokens == 300
        (loss + heeded * info["text_weight"] * text).backward()
        curve.append(float(loss.detach()) / sum(part.numel() for part in losses))
        for group in adam.param_groups:
            group["lr"] = info["rate"] * learning_rate(number, len(steps)) * group["scale"]
        adam.step()
    assert info["curve"] == pytest.approx(curve, rel=1e-5)
    assert (info["tokens"], info["written_tokens"]) == ((288, 0) if tokens == 300 else (576, 144))
    assert info["rate"] == pytest.approx(thresholds().max_lr * info["divergence"]["before"] ** 0.5)
    assert info["text_weight"] == pytest.approx(distillation.TEXT_WEIGHT * info["divergence"]["before"] ** 0.5)
    with torch.no_grad():
        held = torch.cat([divergence(mirror, dense, lesson.ids[b]).flatten() for b in range(lesson.held_out)])
        text = sum(said_by(mirror, lesson.ids[b]) for b in range(lesson.held_out))
        text /= sum(lesson.ids[b][:, 2:].numel() for b in range(lesson.held_out))
    assert info["divergence"]["after"] == pytest.approx(float(held.mean()), rel=1e-4)
    assert info["cross_entropy"]["after"] == pytest.approx(float(text), rel=1e-4)
    both = [info["divergence"][at] + info["text_weight"] * info["cross_entropy"][at] for at in ("before", "after")]
    assert info["kept"] == (both[1] < both[0])
    training.apply(slim)
    for name, parameter in slim.named_parameters():
        moved = name in scales
        expected = mirror.get_parameter(name).detach()
        # Moments are kept in bfloat16: 3 digits of a step, and a step is RATE of the matrix. Here are two, or four.
        scale = float(expected.square().mean().sqrt())
        room = (0.01 * len(steps) * info["rate"] + 1e-6) * scale if moved else 0.0
        assert float((parameter - expected).abs().max()) <= room, name


def test_held_out_text_is_not_trained_on():
    lesson = case("llama")[2].data
    held = {tuple(row) for batch in lesson.ids[: lesson.held_out] for row in batch.tolist()}
    trained = {tuple(row) for batch in lesson.ids[lesson.held_out :] for row in batch.tolist()}
    assert held == {tuple(row) for row in IDS[-6:].tolist()}
    assert not held & trained
    assert trained <= {tuple(row) for row in IDS.tolist()}


def test_what_is_kept_in_files_or_brought_every_time_gives_the_same():
    trainings = [
        case("llama", place, budget=budget)[2]
        for place, budget in (("device", 10**12), ("file", 10**12), ("device", 0))
    ]
    infos = [training() for training in trainings]
    assert [len(training.resident_layers) for training in trainings] == [4, 4, 0]
    for index in range(4):
        one, *others = (training.parameters(index) for training in trainings)
        assert all(torch.equal(one[name], other[name]) for other in others for name in one)
    assert infos[0]["curve"] == infos[1]["curve"] == infos[2]["curve"]


def test_a_model_in_memory_is_trained_if_that_helps():
    plain, trained, spoilt = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    calls, options = [], {**OPTIONS, "calibration": IDS[:6].repeat(4, 1)}  # what helps the one part helps the other
    pruning_split = {**options, "calibration": IDS[:6].repeat(3, 1)}  # the last quarter is held out
    assert slimgpt.prune(plain, None, distill="off", **pruning_split).distillation == {}
    report = slimgpt.prune(trained, None, distill=360, on_distilled=lambda *step: calls.append(step), **options)
    info = report.distillation
    assert info["kept"]
    assert info["divergence"]["after"] < info["divergence"]["before"]
    assert info["tokens"] == 360
    assert [(step, steps) for step, steps, _, _ in calls] == [(n, info["steps"]) for n in range(info["steps"])]
    back = slimgpt.pruning.PruneReport.from_json(json.loads(json.dumps(report.to_json())))
    assert back.distillation == info
    dense = tiny_model("llama")
    with torch.no_grad():
        divergences = [float(divergence(model, dense, IDS[:6]).mean()) for model in (plain, trained)]
    assert divergences == pytest.approx([info["divergence"]["before"], info["divergence"]["after"]], rel=1e-4)
    with other_thresholds(max_lr=50.0):
        assert not slimgpt.prune(spoilt, None, distill=360, **options).distillation["kept"]
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, spoilt.get_parameter(name)), name


def test_by_default_it_is_done_where_there_are_tokens_enough():
    assert slimgpt.prune(tiny_model("llama"), None, **OPTIONS).distillation == {}
    with other_thresholds(min_training_tokens=200):
        report = slimgpt.prune(tiny_model("llama"), None, **OPTIONS)
        passes = 1.4 / (1 + 7 / 3 * (1 - report.plan.achieved))
        assert report.distillation["tokens"] == int(passes * IDS.numel()) // 24 * 24
        for other in ({"method": "paper"}, {"method": "wanda"}, {"repair": False}):
            assert slimgpt.prune(tiny_model("llama"), None, **OPTIONS, **other).distillation == {}


@pytest.mark.parametrize("value", [-1, "much", "1e3"])
def test_what_is_no_number_of_tokens_is_refused(value):
    with pytest.raises(slimgpt.SlimGPTError, match="distill"):
        make_config(ratio=0.3, distill=value)


def test_a_step_is_nearly_what_it_should_be_whatever_the_batch_size():
    """Against all ways to divide it."""
    for count in range(1, 80):
        for most in range(1, 40):
            size, number = _equal_batches(count, most)
            fewest = min(n for n in range(1, count + 1) if -(-count // n) <= most)
            assert (size, number) == (max(s for s in range(1, most + 1) if s * fewest <= count), fewest)


def test_what_is_not_there_is_written_first():
    dense, _, training = case("llama")
    assert training.data.steps == [range(6, 12), range(12, 18)]
    assert training.data.generated == 0
    calls = []
    take = decoder_layers(dense).__getitem__
    lesson = build_distillation_data(
        dense, take, IDS, 1100, CONFIG, run(), on_rehearsed=lambda *step: calls.append(step)
    )
    # 45 windows of 24 tokens are asked for; 18 are there, behind the six that are held out.
    assert lesson.generated == 27
    assert [len(step) for step in lesson.steps] == [6, 6, 6, 6, 3, 6, 6, 6]
    assert [number for step in lesson.steps for number in step] == list(range(6, 51))
    assert lesson.count(range(6, 51)) == 1080
    given = {tuple(row) for row in IDS[:18].tolist()}
    of_text, of_model = (
        {tuple(row) for n in part for row in lesson.ids[n].tolist()} for part in (range(33, 51), range(6, 33))
    )
    assert of_text == given
    assert len(of_model) == 27
    assert not of_model & given
    begun = {tuple(row[start : start + 12]) for row in given for start in range(13)}
    assert {row[:12] for row in of_model} <= begun
    for number in range(len(lesson.ids)):
        with torch.no_grad():
            last = dense.model(lesson.ids[number]).last_hidden_state
        # transformers' rotary angles are fp32 in an fp64 model, and round otherwise for one position than for many.
        assert torch.allclose(dense.model.norm(lesson.dense_hidden.get(number)), last, atol=2e-6)
    writes, reads = ([call for call in calls if word in call[0]] for word in ("generating", "teacher"))
    assert [call[1:3] for call in writes] == [(n, 12) for n in range(12)]
    assert [call[1:3] for call in reads] == [(n, 4) for n in range(4)]


def test_a_search_trains_longer():
    shape = describe(tiny_model("llama").config)
    plan = plan_for(tiny_model("llama").config, CONFIG, shape)
    room = 18 * 24
    for allocation, passes, back in (("auto", 1.4, 4 / 3), ("search", 11.5, 2)):
        config = make_config(ratio=0.4, batch_size=3, allocation=allocation)
        with other_thresholds(min_training_tokens=200):
            tokens = tokens_to_distill(config, plan, IDS)
        assert (tokens > room) == (allocation == "search")
        written = max(tokens - room, 0)
        expected = tokens * (1 + (1 + back) * (1 - plan.achieved)) + 0.5 * written
        assert expected == pytest.approx(passes * IDS.numel(), rel=0.01)
        assert passes_to_distill(config, plan, IDS, tokens) == pytest.approx(expected)


@pytest.mark.parametrize(("ratio", "whole"), [(0.2, False), (0.6, True)])
def test_equal_layers_train_on_the_text_once_at_most(ratio, whole):
    """They cost 2.7 forward passes, unless the text is used up before: nothing is written for them."""
    model = tiny_model("llama")
    config = make_config(ratio=ratio, uniform=True)
    plan = plan_for(model.config, config, describe(model.config))
    windows = torch.zeros(4000, 24, dtype=torch.long)
    tokens = tokens_to_distill(config, plan, windows)
    cost = 1 + (1 + 4 / 3) * (1 - plan.achieved)
    assert tokens == ((4000 - 2048 // 24) * 24 if whole else pytest.approx(2.7 * windows.numel() / cost, abs=1))
    assert tokens > tokens_to_distill(replace(config, uniform=False), plan, windows)


def test_equal_layers_never_train_on_less_than_others():
    config = make_config(ratio=0.2, uniform=True)
    model, windows = tiny_model("llama"), torch.zeros(4000, 24, dtype=torch.long)
    plan = plan_for(model.config, CONFIG, describe(model.config))
    for achieved in (0.05, 0.5, 0.8, 0.9, 0.95):
        most = replace(plan, achieved=achieved)
        tokens = [tokens_to_distill(replace(config, uniform=uniform), most, windows) for uniform in (True, False)]
        assert tokens[0] >= tokens[1]


@pytest.mark.parametrize("length", [24, 300, 384, 512])
def test_what_a_window_leaves_over_is_not_trained_on(length):
    """Windows are cut into pieces of 256; a text is used up when all pieces are."""
    windows = torch.zeros(64, length, dtype=torch.long)
    piece = min(length, 256)
    held = max(min(2048, windows.numel() // 4) // length, 1)
    assert trainable_tokens(windows) == (64 - held) * (length // piece) * piece


def test_one_window_cannot_be_trained_on_and_judged_by():
    one = {**OPTIONS, "calibration": IDS.reshape(1, -1)[:, :60]}
    with pytest.raises(slimgpt.SlimGPTError, match="raise --num-samples"):
        slimgpt.prune(tiny_model("llama"), None, distill=100, **one)
    with other_thresholds(min_training_tokens=50):
        assert slimgpt.prune(tiny_model("llama"), None, **one).distillation == {}


def test_what_is_judged_is_what_is_saved():
    dense = tiny_model("llama").bfloat16()
    slim = copy.deepcopy(dense)
    info = slimgpt.prune(slim, None, distill=360, forward_dtype="float32", **OPTIONS).distillation
    assert info["kept"]
    with torch.no_grad():
        apart = float(divergence(slim.float(), dense.float(), IDS[-6:]).mean())
    assert info["divergence"]["after"] == pytest.approx(apart, rel=1e-4)
