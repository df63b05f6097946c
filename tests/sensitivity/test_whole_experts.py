"""Whole experts or channels of them: trials against whole models of transformers, the choice, and runs with it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.config import make_config
from slimgpt.errors import UsageError
from slimgpt.models import EXPERTS
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.parameter_counts import describe
from slimgpt.planning.expert_plans import with_whole_experts
from slimgpt.planning.planner import plan_for
from slimgpt.pruning.in_place import prune_model
from slimgpt.sensitivity.measure import ENDPOINT, measure
from slimgpt.sensitivity.trial_pruning import TrialLoss, TrialPruning
from slimgpt.sensitivity.whole_experts import choose_experts, measures_experts
from slimgpt.sensitivity.windows import split_windows
from tests.models.families import tiny_model, windows
from tests.models.mixtures import tiny_mixture
from tests.pipeline.folders import files_of, report_of
from tests.sensitivity.test_measure import divergence, run

IDS = windows(12, 24)
FAMILIES = ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"]
CONFIG = make_config(ratio=0.45, batch_size=5)
OPTIONS = {"ratio": 0.45, "batch_size": 5, "device": "cpu", "allocation": "sensitivity", "distill": "off"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_divergence_of_a_trial_is_that_of_the_whole_model_pruned(family):
    """Twice, since the dense model goes along with the first trial alone."""
    model = tiny_mixture(family).double()
    model.set_experts_implementation("eager")
    shape = describe(model.config, model)
    plan = plan_for(model.config, CONFIG, shape)
    whole = with_whole_experts(plan, shape, CONFIG, model.config, 1.0, routed_only=True)
    assert whole is not None
    layers = []
    trials = TrialPruning(model, model.model.layers.__getitem__, IDS, CONFIG, run(), lambda: layers.append(1))
    fit, probe = split_windows(IDS, max(max(sizes.values()) for sizes in layer_sizes(model.config)))
    for tried in (whole, plan):
        slim = copy.deepcopy(model)
        for _ in prune_model(slim, fit, tried, CONFIG, run()):
            pass
        loss = trials(tried)
        assert loss.divergence == pytest.approx(divergence(slim, model, probe), rel=1e-6)
        with torch.no_grad():
            logits = slim(probe).logits[:, 1:-1].flatten(0, 1)
        text = torch.nn.functional.cross_entropy(logits, probe[:, 2:].flatten())
        assert loss.cross_entropy == pytest.approx(float(text), rel=1e-6)
    assert len(layers) == 2 * len(shape.layers)
    # Of channels alone there is a path to the narrow matrices; its end is measured otherwise.
    end = measure(model, model.model.layers.__getitem__, IDS, plan, CONFIG, run(), points=ENDPOINT)
    assert trials(plan).divergence == pytest.approx(end.divergence, rel=1e-3)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("best", [0.0, 0.5, 1.0])
def test_the_plan_that_predicts_text_best_is_taken_and_half_is_tried_the_better_way(best, alone):
    model = tiny_mixture("qwen2_moe")
    shape = describe(model.config, model)
    plan = plan_for(model.config, CONFIG, shape)
    shares = {}
    for share in (0.5, 1.0):
        for only in (False, True):
            made = with_whole_experts(plan, shape, CONFIG, model.config, share, routed_only=only)
            shares[json.dumps(made.layers)] = (share, only)
    asked = []

    def trial(tried):
        share, only = shares.get(json.dumps(tried.layers), (0.0, False))
        asked.append((share, only))
        return TrialLoss(1.0 - share, abs(share - best) + (0.1 if only != alone else 0.0) * bool(share))

    chosen, entry = choose_experts(plan, shape, CONFIG, model.config, trial)
    assert asked == [(0.0, False), (1.0, False), (1.0, True), (0.5, alone)]
    assert [(each["share"], each["routed_only"]) for each in entry["tried"]] == asked
    share, only = shares.get(json.dumps(chosen.layers), (0.0, False))
    assert share == best
    assert only == (alone and best > 0)
    assert entry["tried"][entry["chosen"]]["parameters"] == chosen.parameters
    assert entry["processor_seconds"] >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_takes_the_best_trial_and_says_all_of_them(family):
    model = tiny_mixture(family)
    report = slimgpt.prune(model, None, calibration=windows(40, 24), **OPTIONS)
    entry = report.allocation["experts"]
    kls, texts = ([each[name] for each in entry["tried"]] for name in ("divergence", "cross_entropy"))
    assert len(kls) >= 3
    assert entry["chosen"] == min(range(len(texts)), key=texts.__getitem__)
    assert report.plan.parameters == entry["tried"][entry["chosen"]]["parameters"]
    assert {layer[EXPERTS] for layer in report.plan.layers if EXPERTS in layer} == set(
        entry["tried"][entry["chosen"]]["experts"]
    )
    assert report.settings.whole_experts == "auto"
    text = report.summary()
    assert all(f"{text_loss:.3f} (KL {kl:.3f})" in text for kl, text_loss in zip(kls, texts))
    assert report.execution["processor_seconds"] > 0


def test_equal_layers_are_tried_too():
    model = tiny_mixture("mixtral", intermediate_size=160)
    options = {**OPTIONS, "allocation": "auto", "uniform": True}
    report = slimgpt.prune(model, None, calibration=windows(400, 24), **options)
    tried = report.allocation["experts"]["tried"]
    assert report.allocation["by"] == "schedule"
    assert {each["share"] for each in tried} == {0.0, 0.5, 1.0}
    assert report.plan.uniform
    assert type(model.config).__module__.startswith("transformers.")


def test_a_number_or_a_schedule_is_followed_without_trials():
    shape, text = describe(tiny_mixture("mixtral").config), windows(400, 24)
    assert measures_experts(make_config(ratio=0.3), shape, text)
    assert not measures_experts(make_config(ratio=0.3), shape, windows(4, 24))  # too little text
    for settings in (
        {"whole_experts": 0.0},
        {"whole_experts": "0.5"},
        {"schedule": "uniform"},
        {"allocation": "schedule"},
        {"method": "magnitude"},
        {"method": "reap"},
    ):
        assert not measures_experts(make_config(ratio=0.3, **settings), shape, text)
    assert not measures_experts(make_config(ratio=0.3), describe(tiny_model("llama").config), text)
    assert make_config(whole_experts="0.5").whole_experts == 0.5
    assert make_config(method="reap").whole_experts == 1.0
    for wrong in ("half", "1.5", -1):
        with pytest.raises(UsageError, match=f"whole_experts is {wrong}"):
            make_config(whole_experts=wrong)


def test_forbidden_whole_experts_give_the_measured_channels():
    text = windows(40, 24)
    forbidden = slimgpt.prune(tiny_mixture("qwen2_moe"), None, calibration=text, whole_experts=0, **OPTIONS)
    free = slimgpt.prune(tiny_mixture("qwen2_moe"), None, calibration=text, **OPTIONS)
    assert "experts" not in forbidden.allocation
    assert forbidden.allocation["contributions"] == free.allocation["contributions"]
    assert forbidden.plan.parameters == free.allocation["experts"]["tried"][0]["parameters"]
    assert all(layer.get(EXPERTS, 6) == 6 for layer in forbidden.plan.layers)


def folder_of(family, tokenizer, path):
    tiny_mixture(family).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_run_to_a_folder_killed_and_resumed_is_that_in_memory(tokenizer, text_file, tmp_path):
    dense = folder_of("qwen2_moe", tokenizer, tmp_path / "dense")
    options = {**OPTIONS, "num_samples": 24, "seq_len": 24, "calibration": str(text_file), "distill": 200}
    plain = slimgpt.prune_folder(dense, tmp_path / "plain", **options)
    model, _ = slimgpt.load(dense)
    held = slimgpt.prune(model, tokenizer, **options)
    assert held.plan.layers == plain.plan.layers
    assert held.allocation["experts"]["chosen"] == plain.allocation["experts"]["chosen"]

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimgpt.prune_folder(dense, tmp_path / "again", on_layer=killed, **options)
    slimgpt.prune_folder(dense, tmp_path / "again", resume=True, **options)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "plain")
    assert report_of(tmp_path / "again") == report_of(tmp_path / "plain")


def test_the_command_says_what_was_tried_and_a_plan_that_it_will_be(tokenizer, text_file, tmp_path):
    dense = folder_of("mixtral", tokenizer, tmp_path / "dense")
    given = [dense, "--ratio", "0.45", "--num-samples", "24", "--seq-len", "24"]
    words = ["prune", dense, str(tmp_path / "slim"), *given[1:], "--calibration", str(text_file), "--device", "cpu"]
    done = CliRunner().invoke(app, [*words, "--allocation", "sensitivity", "--distill", "off", "--no-evaluate"])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("experts: "))
    for each in report_of(tmp_path / "slim")["allocation"]["experts"]["tried"]:
        assert f"{each['divergence']:.3f}" in line
    planned = CliRunner().invoke(app, ["plan", dense, "--ratio", "0.45"])
    assert planned.exit_code == 0, planned.output
    assert "the run measures whether whole experts" in " ".join(planned.output.split())
    fixed = CliRunner().invoke(app, ["plan", dense, "--ratio", "0.45", "--whole-experts", "0.5"])
    assert "the run measures" not in fixed.output


def test_experts_of_odd_widths_keep_the_alignment_they_have():
    """52 channels in fp32 are rows of 13 times 16 bytes: the kernel of transformers takes multiples of 4 of them."""
    model = tiny_model("mixtral", intermediate_size=52)
    assert {sizes["intermediate_size"] for sizes in layer_sizes(model.config)} == {52}
    report = slimgpt.prune(model, None, calibration=windows(20, 24), **OPTIONS)
    assert all(sizes["intermediate_size"] % 4 == 0 for sizes in report.plan.layers)
    assert model(windows(1, 24)).logits.isfinite().all()
