"""GGUF files evaluated in llama.cpp: which engine is taken, and its figures against those of the slim folder."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import ModelError, UsageError
from slimgpt.evaluation import llama_cpp as module
from slimgpt.evaluation import load_gguf, perplexity
from slimgpt.evaluation.llama_cpp import choose_engine, engines_of
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import tiny_model

WINDOW, TOKENS = 48, 960


@pytest.fixture
def installed(monkeypatch):
    """As if llama-cpp-python were installed, or not."""

    def set_to(present: bool) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *rest: present or None if name == "llama_cpp" else find(name, *rest),
        )

    return set_to


@pytest.mark.parametrize(
    ("name", "engine", "beyond", "present", "expected"),
    [
        ("a.gguf", "auto", [], True, "llama.cpp"),
        ("a.gguf", "auto", [], False, "transformers"),
        ("a.gguf", "auto", ["--tasks"], True, "transformers"),
        ("a.gguf", "transformers", [], True, "transformers"),
        ("folder", "auto", [], True, "transformers"),
        ("a.gguf", "llama.cpp", [], True, "llama.cpp"),
        ("folder", "llama.cpp", [], True, "folder is none"),
        ("a.gguf", "llama.cpp", [], False, "pip install llama-cpp-python"),
        ("a.gguf", "llama.cpp", ["--tasks", "--dtype"], True, "--tasks, --dtype: not with llama.cpp"),
        ("a.gguf", "vllm", [], True, "engine 'vllm' is unknown"),
    ],
)
def test_which_engine(name, engine, beyond, present, expected, installed):
    installed(present)
    if expected in module.ENGINES:
        assert choose_engine(name, engine, beyond) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            choose_engine(name, engine, beyond)


def test_the_engine_of_the_base(installed):
    installed(True)
    none, auto = {"--tasks": None}, {"--dtype": "auto", "--device": "cpu"}
    assert engines_of("a.gguf", "base", "llama.cpp", none, auto) == {"a.gguf": "llama.cpp", "base": "transformers"}
    float32 = {"--dtype": "float32", "--device": "auto"}  # of the base
    assert engines_of("a.gguf", "base", "llama.cpp", none, float32)["a.gguf"] == "llama.cpp"
    assert set(engines_of("a.gguf", "base", "auto", none, float32).values()) == {"transformers"}
    assert set(engines_of("a.gguf", "b.gguf", "transformers", none, auto).values()) == {"transformers"}
    assert set(engines_of("a.gguf", "b.gguf", "auto", none, auto).values()) == {"llama.cpp"}
    assert engines_of("slim", "b.gguf", "auto", none, auto) == {"slim": "transformers", "b.gguf": "llama.cpp"}
    with pytest.raises(UsageError, match="--dtype: not with"):
        engines_of("a.gguf", None, "llama.cpp", none, float32)


def test_an_engine_that_does_not_fit_is_refused(dense_folder, text_file):
    done = CliRunner().invoke(app, ["evaluate", str(dense_folder), "--text", str(text_file), "--engine", "llama.cpp"])
    assert done.exit_code == 2
    assert "llama.cpp runs .gguf files" in " ".join(done.output.split())


@pytest.fixture(scope="module")
def line(tmp_path_factory, text_file):
    """The text on one line: the tiny tokenizer knows no line ends, for which Hugging Face's gives an unknown token and
    llama.cpp none."""
    file = tmp_path_factory.mktemp("line") / "line.txt"
    file.write_text(" ".join(text_file.read_text().split()))
    return file


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """A tiny Llama, its slim version of widths that differ by layer, and that as GGUF files in F32 and F16."""
    pytest.importorskip("llama_cpp")
    root = tmp_path_factory.mktemp("gguf")
    model = tiny_model("llama")
    with torch.no_grad():  # layers of a random model hardly say anything: what is removed from these is missed
        for parameter in model.model.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    ids = torch.randint(tiny_model("llama").config.vocab_size, (16, 24), generator=torch.Generator().manual_seed(1))
    report = slimgpt.prune(model, None, ratio=0.3, calibration=ids, device="cpu", schedule="log_increase")
    slimgpt.save(model, tokenizer, report, root / "slim")
    slimgpt.export(root / "dense", root / "dense.gguf", "gguf", quantize="F32", check=False)
    for name in ("F32", "F16"):
        slimgpt.export(root / "slim", root / f"{name}.gguf", "gguf", quantize=name, check=False)
    return root


@pytest.mark.llama_cpp
@pytest.mark.parametrize(("name", "limit"), [("F32", 3e-4), ("F16", 1e-3)])
def test_a_gguf_file_has_the_figures_of_its_folder(name, limit, exported, line):
    arguments = {"window": WINDOW, "max_tokens": TOKENS, "against": str(exported / "dense")}
    expected = slimgpt.evaluate(*slimgpt.load(str(exported / "slim")), str(line), **arguments)
    measured = slimgpt.evaluate(*load_gguf(exported / f"{name}.gguf"), str(line), **arguments)
    assert expected.divergence is not None
    assert measured.divergence is not None
    assert expected.divergence.kl.mean > 0.02  # there is something to measure
    assert 0.05 < expected.divergence.same_top < 0.98
    assert (measured.predicted, measured.tokens) == (expected.predicted, expected.tokens)
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=limit)
    assert measured.byte_perplexity == pytest.approx(expected.byte_perplexity, rel=limit)
    assert measured.divergence.kl.mean == pytest.approx(expected.divergence.kl.mean, rel=10 * limit)
    assert measured.divergence.kl.median == pytest.approx(expected.divergence.kl.median, rel=20 * limit)
    assert measured.divergence.same_top == pytest.approx(expected.divergence.same_top, abs=4 / measured.predicted)
    assert measured.divergence.base_perplexity == pytest.approx(expected.divergence.base_perplexity, rel=1e-9)
    assert measured.protocol["engine"].startswith("llama-cpp-python ")
    assert measured.protocol["dtype"] == name
    assert {k: v for k, v in measured.protocol.items() if k not in ("engine", "dtype", "tokenizer")} == {
        k: v for k, v in expected.protocol.items() if k not in ("engine", "dtype", "tokenizer")
    }


@pytest.mark.llama_cpp
def test_divergence_is_that_of_llama_cpps_own_logits(exported, line, tokenizer):
    """Two GGUF files, and the figures from the logits that llama.cpp gives for each, token by token in fp64."""
    import llama_cpp

    ids = tokenizer(line.read_text())["input_ids"][:TOKENS]
    tables = []
    for name in ("dense", "F16"):
        llama = llama_cpp.Llama(str(exported / f"{name}.gguf"), n_ctx=512, logits_all=True, verbose=False)
        pieces = []
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            llama.reset()
            llama.eval(ids[start : start + WINDOW])
            pieces.append(torch.tensor(llama.scores[: WINDOW - 1].copy()).double().log_softmax(-1))
        tables.append(torch.cat(pieces))
    base, model = tables
    kl = [sum(math.exp(a) * (a - b) for a, b in zip(p, q)) for p, q in zip(base.tolist(), model.tolist())]
    first, _ = load_gguf(exported / "dense.gguf")
    divergence = perplexity(
        *load_gguf(exported / "F16.gguf"), line.read_text(), WINDOW, TOKENS, against=first
    ).divergence
    assert divergence is not None
    assert divergence.kl.mean == pytest.approx(sum(kl) / len(kl), rel=1e-6)
    assert divergence.kl.maximum == pytest.approx(max(kl), rel=1e-6)
    assert divergence.same_top == pytest.approx(float((base.argmax(-1) == model.argmax(-1)).double().mean()))


@pytest.mark.llama_cpp
def test_a_window_longer_than_the_first_context(exported, line):
    expected = perplexity(*load_gguf(exported / "F32.gguf"), line.read_text(), WINDOW, TOKENS)
    with other_thresholds(first_context=16):
        result = perplexity(*load_gguf(exported / "F32.gguf"), line.read_text(), WINDOW, TOKENS)
    assert result.perplexity == pytest.approx(expected.perplexity, rel=1e-9)
    with other_thresholds(first_context=16), pytest.raises(UsageError, match="longer than the model's context"):
        perplexity(*load_gguf(exported / "F32.gguf"), line.read_text(), 300)


@pytest.mark.llama_cpp
def test_the_command_takes_llama_cpp_and_says_so(exported, line, tmp_path):
    words = ["--text", line, "--window", WINDOW, "--max-tokens", TOKENS, "--json", tmp_path / "found.json"]
    file, base = exported / "F32.gguf", exported / "dense"
    done = CliRunner().invoke(app, [str(word) for word in ("evaluate", file, "--against", base, *words)])
    assert done.exit_code == 0, done.output
    assert "F32 in llama-cpp-python" in " ".join(done.output.split())
    values = json.loads((tmp_path / "found.json").read_text())
    expected = perplexity(*load_gguf(file), line.read_text(), WINDOW, TOKENS)
    assert values["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert values["divergence"]["kl"]["mean"] > 0.02
    done = CliRunner().invoke(app, ["evaluate", str(file), "--text", str(line), "--update-card"])
    assert done.exit_code == 2


@pytest.mark.llama_cpp
def test_what_llama_cpp_does_not_read(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ModelError, match="does not read"):
        load_gguf(tmp_path / "broken.gguf")
    with pytest.raises(ModelError, match="no such GGUF file"):
        load_gguf(tmp_path / "nothing.gguf")
