"""Several sources of calibration text, with shares."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slimgpt
from slimgpt.calibration import mixture, sample_windows
from slimgpt.calibration.mixture import Part, interleave, parse_mixture, windows_by_part
from slimgpt.calibration.windows import digest
from slimgpt.errors import CalibrationError, UsageError
from tests.calibration.test_self_calibration import OPTIONS


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("auto", [("auto", 1)]),
        ("demo:3", [("demo", 3)]),
        ("auto:2,text.jsonl:1", [("auto", 2), ("text.jsonl", 1)]),
        ("auto, a/b:en:train:0.5", [("auto", 1), ("a/b:en:train", 0.5)]),
        ("allenai/c4:en:train", [("allenai/c4:en:train", 1)]),
        ("some/set:2024", [("some/set:2024", 1)]),
        ("text.jsonl", [("text.jsonl", 1)]),
    ],
)
def test_sources_and_shares(text, parts):
    assert parse_mixture(text) == [Part(source, Fraction(share)) for source, share in parts]


def test_a_file_by_its_whole_name_is_one_source(tmp_path):
    file = tmp_path / "a,b:2"
    file.mkdir()
    assert parse_mixture(str(file)) == [Part(str(file), Fraction(1))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto,,demo", "source with a share above 0"),
        ("auto:0,demo", "source with a share above 0"),
        ("mix:1,demo", "stands alone"),
        ("auto,demo,auto:2", "names 'auto' twice"),
    ],
)
def test_mixtures_that_cannot_be(text, message):
    with pytest.raises(CalibrationError, match=message):
        parse_mixture(text)


@given(st.lists(st.fractions(min_value=Fraction(1, 10), max_value=10), min_size=1, max_size=6), st.integers(6, 300))
def test_windows_are_divided_by_the_shares(shares, count):
    counts = windows_by_part([Part(str(i), share) for i, share in enumerate(shares)], count)
    assert sum(counts) == count
    assert min(counts) >= 1
    exact = [share / sum(shares) * count for share in shares]
    if min(exact) >= 1:
        assert all(abs(number - share) < 1 for number, share in zip(counts, exact))


def test_fewer_windows_than_sources_are_refused():
    with pytest.raises(CalibrationError, match="raise it"):
        windows_by_part(parse_mixture("auto,demo"), 1)


def test_windows_of_several_sources_are_interleaved():
    one, other = torch.zeros(50, 3, dtype=torch.long), torch.ones(50, 3, dtype=torch.long)
    mixed = interleave([one, other], 0)
    assert mixed.sum() == 150
    assert 5 < int(mixed[:25, 0].sum()) < 20
    assert torch.equal(mixed, interleave([one, other], 0))
    assert torch.equal(interleave([one], 0), one)


def test_given_text_alone_gives_the_windows_of_before(dense_folder, text_file, tmp_path):
    _, tokenizer = slimgpt.load(str(dense_folder))
    report = slimgpt.prune_folder(str(dense_folder), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    assert report.calibration == {
        "source": str(text_file),
        "dataset": None,
        "num_samples": 12,
        "seq_len": 48,
        "sha256": digest(sample_windows(tokenizer, str(text_file), 12, 48, 0)),
    }


def test_a_mixture_with_text_of_the_model(dense_folder, text_file, tmp_path):
    source = f"auto:2,{text_file}:1"
    report = slimgpt.prune_folder(str(dense_folder), tmp_path / "slim", calibration=source, **OPTIONS)
    assert report.calibration["source"] == source
    assert report.calibration["dataset"] is None
    assert report.calibration["mixture"] == [
        {"source": "auto", "share": 2, "dataset": None},
        {"source": str(text_file), "share": 1, "dataset": None},
    ]
    card = (tmp_path / "slim" / "README.md").read_text()
    assert f"--calibration auto:2,{text_file.name}:1" in card  # of local files only their names
    assert str(text_file) not in card
    assert report.divergence["held_out"]["source"] == source
    assert report.calibration["num_samples"] == 12
    assert report.calibration["self_written"]["num_samples"] == 8
    assert report.calibration["self_written"]["sha256"] != report.calibration["sha256"]
    model, tokenizer = slimgpt.load(str(dense_folder))
    again = slimgpt.prune(model, tokenizer, calibration=source, **OPTIONS)
    assert again.calibration["sha256"] == report.calibration["sha256"]
    with pytest.raises(UsageError, match="no such text"):
        slimgpt.prune(model, tokenizer, calibration="auto:2,none.jsonl:1", **OPTIONS)


def test_mix_names_what_it_stands_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert mixture.mix_sources() == "auto:2,demo:1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(mixture, "_in_reach", lambda: True)
    parts = parse_mixture(mixture.mix_sources())
    assert [part.source for part in parts] == ["auto", "demo", *mixture.HUB_SETS]
    assert parts[0].share == sum(part.share for part in parts[1:])
