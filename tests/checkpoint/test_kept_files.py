"""Files of an unfinished run: a byte that has changed is noticed, wherever it is."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

from slimgpt.checkpoint.journal import Journal
from slimgpt.checkpoint.kept_files import read_values, write_values
from slimgpt.distillation.generate import GeneratedText
from slimgpt.errors import ResumeError
from slimgpt.models.architecture import CHANNELS
from slimgpt.models.parameter_counts import describe
from slimgpt.pipeline.journal_sink import PLAN_FILE, JournalSink
from slimgpt.pipeline.self_written import KeptRounds
from slimgpt.planning.plan import plan_of_widths
from slimgpt.pruning.report import LayerReport, PrunedLayer
from slimgpt.recovery.resume import Workspace
from slimgpt.runtime.distributed import ALONE
from tests.models.families import tiny_model


def state(seed):
    """Tensors of a layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "mlp.weight": torch.randn(3, 5, generator=generator),
        "norm": torch.randn(5, generator=generator).bfloat16(),
    }


REPORT = LayerReport(0, {"intermediate_size": 3}, {"channels": [0, 2, 4]}, {"channels": 0.25}, 40, 20, {"solver": 1.5})
TEXT = GeneratedText(torch.arange(6).view(2, 3), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3)))
INFO = {"kept": True, "curve": [0.5, float("nan"), 1e-17], "tokens": 48}


@pytest.fixture
def journal(tmp_path):
    """A journal with everything that a run of one layer keeps."""
    journal = Journal(tmp_path / "slim", "model.layers", {"ratio": 0.3})
    journal.open(False)
    journal.write(PrunedLayer(REPORT, state(1)))
    journal.write_generated(TEXT)
    journal.write_training(state(4))
    journal.write_distilled([state(2)], INFO)
    KeptRounds(journal.folder / "self-calibration").write(0, {"texts": ["river", "\u00e9"], "seconds": 0.1})
    return journal


def all_kept(journal):
    """All that a resumed run reads, as it uses it."""
    journal.open(True)
    layer = journal(0)
    info = journal.distillation_info()
    return {
        "report": repr(layer.report.to_json()),
        "layer": layer.state,
        "info": repr(info),
        "trained": journal.final_state(0),
        "training": journal.training(),
        "text": journal.generated()._asdict(),
        "round": repr(KeptRounds(journal.folder / "self-calibration").read(0)),
    }


def same(one, other):
    """Whether two such results are equal to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_journal_reads_back_what_it_was_given(journal):
    read = all_kept(journal)
    assert same(read["layer"], state(1))
    assert same(read["trained"], state(2))
    assert same(read["training"], state(4))
    assert same(read["text"], TEXT._asdict())
    assert read["info"] == repr(INFO)
    assert read["report"] == repr(REPORT.to_json())


KEPT = (
    "layers/00000.json", "layers/00000.safetensors", "distilled/00000.safetensors", "distillation.json",
    "text.safetensors", "training.safetensors", "self-calibration/00000.json", "journal.json",
)  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_changed_byte_is_refused_or_changes_nothing(name, journal):
    before = all_kept(journal)
    file = journal.folder / name
    whole = file.read_bytes()
    draw = random.Random(name)
    places = range(len(whole)) if len(whole) < 60 else sorted(draw.sample(range(len(whole)), 60))
    refused = 0
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            read = all_kept(journal)
        except ResumeError as error:
            refused += str(file) in str(error) or name == "journal.json"
        else:
            assert same(read, before), f"byte {place} of {name}"
    assert refused > 0.5 * len(places)
    file.write_bytes(whole)
    assert same(all_kept(journal), before)


def test_widths_that_have_changed_are_refused(journal):
    shape = describe(tiny_model("llama").config)
    layers = [dict(layer.sizes) for layer in shape.layers]
    schedule = plan_of_widths(shape, layers, "kv")
    sink = JournalSink(
        SimpleNamespace(plan=schedule, shape=shape, device="cpu"),
        journal,
        None,
        ALONE,
        ALONE,  # type: ignore[arg-type]
    )
    chosen = plan_of_widths(shape, [{**layer, CHANNELS: layer[CHANNELS] - 8} for layer in layers], "kv")
    assert sink.measured_plan(lambda: (chosen, {"seconds": 1.0}))[0].layers == chosen.layers
    assert sink.measured_plan(None)[0].layers == chosen.layers  # type: ignore[arg-type]  # from the file
    file = journal.folder / PLAN_FILE
    whole = file.read_text()
    number = str(chosen.layers[0][CHANNELS])
    for content in (whole.replace(number, str(int(number) - 1), 1), whole[: len(whole) // 2], "", "[]"):
        file.write_text(content)
        with pytest.raises(ResumeError, match=r"plan\.json is damaged .* start anew with --overwrite"):
            sink.measured_plan(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"settings": {"rat', "\x00"])
def test_a_journal_that_was_cut_is_refused(content, journal):
    (journal.folder / "journal.json").write_text(content)
    with pytest.raises(ResumeError, match=r"journal\.json is damaged .* start anew with --overwrite"):
        journal.open(True)
    journal.open(False, overwrite=True)


def test_layers_that_have_changed_places_are_refused(journal):
    journal.write(PrunedLayer(LayerReport(**{**REPORT.to_json(), "layer": 1}), state(6)))
    for suffix in ("json", "safetensors"):
        first, second = (journal.layers / f"0000{number}.{suffix}" for number in (0, 1))
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    with pytest.raises(ResumeError, match=r"00000\.json is damaged \(it is of another layer\)"):
        journal.open(True)


def test_values_of_every_kind_are_read_back(tmp_path):
    values = {
        "numbers": [0.1, 1e300, -0.0, 2**70, float("inf")],
        "text": "\U0001f600 \u2028",
        "none": None,
        "in": {"a": [True]},
    }
    write_values(tmp_path / "values.json", values)
    assert read_values(tmp_path / "values.json") == values
    for content in ("", "[]", "3", "{}", json.dumps(values)):
        (tmp_path / "values.json").write_text(content)
        with pytest.raises(ResumeError, match=r"values\.json is damaged"):
            read_values(tmp_path / "values.json")


def test_choices_of_a_recovery_that_have_changed_are_refused(tmp_path):
    workspace = Workspace(tmp_path / "slim")
    workspace.open({}, False, False)
    workspace.choice("bf16", lambda: True)
    file = workspace.folder / "choices.json"
    file.write_text(file.read_text().replace("true", "false"))
    with pytest.raises(ResumeError, match=r"choices\.json is damaged"):
        Workspace(tmp_path / "slim").open({}, True, False)
