"""GGUF files in stock llama.cpp. Run where llama-cpp-python is installed: ``pytest -m llama_cpp``."""

from __future__ import annotations

import pytest

import slimgpt
from tests.export.test_export import GGUF_FITS, slim  # noqa: F401  (a fixture)

pytestmark = pytest.mark.llama_cpp


@pytest.fixture(autouse=True)
def engine():
    pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", GGUF_FITS)
def test_llama_cpp_computes_what_transformers_does(name, uniform, slim, tmp_path):  # noqa: F811
    folder = slim(name, GGUF_FITS[name], uniform=uniform)
    report = slimgpt.export(folder, tmp_path / "slim.gguf", "gguf", quantize="F32")
    verification = report.verification
    assert verification is not None
    assert abs(verification.difference) < 5e-4
    assert verification.continuations == (5, 5)


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "limit"), [("F32", 5e-4), ("F16", 5e-3), ("Q8_0", 2e-2)])
def test_a_real_model_pruned_by_a_third(quantize, limit, tmp_path_factory, tmp_path):
    folder = tmp_path_factory.getbasetemp() / "smollm2-slim"
    if not folder.exists():
        slimgpt.prune_folder("demo", folder, ratio=0.3, num_samples=16, seq_len=256, device="cpu")
    report = slimgpt.export(folder, tmp_path / "slim.gguf", "gguf", quantize=quantize)
    verification = report.verification
    assert verification is not None
    assert abs(verification.difference) < limit
    assert verification.chat_template is True
    if quantize == "F32":
        assert verification.continuations == (5, 5)
