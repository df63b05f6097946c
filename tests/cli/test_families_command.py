"""``slimgpt families``: one table for people, by the names they use."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from slimgpt.cli import app
from slimgpt.models.families import ARCHITECTURES, MULTIMODAL, PARTS, REFUSED
from slimgpt.models.families.names import KNOWN_AS


def asked(*words):
    result = CliRunner().invoke(app, ["families", *words, "--json"])
    assert result.exit_code == 0, result.output
    return {row["model_type"]: row for row in json.loads(result.stdout)}


def test_every_family_has_a_row_and_multimodal_ones_say_what_is_inside():
    rows = asked()
    assert set(rows) == {*ARCHITECTURES, *MULTIMODAL, *REFUSED}
    assert {kind for kind, row in rows.items() if row["inside"]} == set(MULTIMODAL)
    assert rows["qwen3_vl"]["inside"] == "model.language_model"
    assert rows["qwen3_vl"]["units"] == rows["qwen3"]["units"]
    assert "mistral" not in rows["llava"]["note"]  # no other type holds a LLaVA


def test_names_belong_to_families_that_are_described_or_refused():
    assert set(KNOWN_AS) <= {*ARCHITECTURES, *MULTIMODAL, *REFUSED, *PARTS}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Qwen3.5", {"qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"}),
        ("gpt-oss", {"gpt_oss"}),
        ("DeepSeek R1", {"deepseek_v3"}),
        ("kimi-k2", {"deepseek_v3", "kimi_k25"}),
        ("llama", {"llama"}),
        ("DeepSeek-V4", {"deepseek_v4"}),
    ],
)
def test_names_as_people_write_them(name, kinds):
    rows = asked(name)
    assert kinds <= set(rows)
    if name != "DeepSeek R1":
        assert len(rows) <= 6


def test_an_unknown_name_is_told_its_neighbours():
    result = CliRunner().invoke(app, ["families", "Mixtrall"])
    assert result.exit_code == 2
    assert "near it: mixtral" in result.stderr
    assert CliRunner().invoke(app, ["families", "--", "-"]).exit_code == 2
