"""Releases of engines: one table for the plan, the card and the page; the folder loads in a transformers of each."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from slimgpt.models.architecture import CHANNELS
from slimgpt.planning.engine_releases import BY_LAYER, RELEASES, releases_for_folder
from slimgpt.planning.engines import ENGINES, engine_support
from tests.models.families import grouped_config

ROOT = Path(__file__).parents[2]
PUBLISHED = [f"5.{minor}.{patch}" for minor in range(7, 25) for patch in (0, 1)]


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.release)
def test_a_folder_loads_in_a_transformers_of_every_release(release):
    needs = [release.transformers, *([BY_LAYER] if release.by_layer else [])]
    assert list(SpecifierSet(",".join(needs)).filter(PUBLISHED))
    assert release.engine in (*ENGINES, "")


def test_the_page_has_the_table():
    page = (ROOT / "docs/guides/serving.md").read_text(encoding="utf-8")
    for each in RELEASES:
        assert any(
            line.startswith(f"| {each.release}") and f"`{each.transformers}`" in line for line in page.splitlines()
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (own,) = [need for need in project["dependencies"] if need.startswith("transformers")]
    assert f"| slimgpt | `{own.removeprefix('transformers')}` |" in page
    assert f"without slimgpt | `{BY_LAYER}`" in page


def test_a_verdict_names_the_releases():
    config = grouped_config(2)
    equal = [dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 6) | {CHANNELS: 64}] * 2
    verdicts = {each.engine: each.releases for each in engine_support(config, [equal[0], {**equal[1], CHANNELS: 32}])}
    assert verdicts["vllm"][-1] == "vLLM 0.33 needs transformers >=5.16.1,<5.21"
    assert verdicts["sglang"] == ("SGLang 0.5.23 needs transformers ==5.19.0",)
    assert verdicts["hf"] == ("widths by layer need transformers >=5.14",)
    assert {each.engine: each.releases for each in engine_support(config, equal)}["hf"] == ()
    assert "SGLang" in releases_for_folder(by_layer=False)
    assert "SGLang" not in releases_for_folder(by_layer=True)
