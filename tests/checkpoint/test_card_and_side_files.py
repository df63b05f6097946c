"""What lies beside the weights: side files go along, and names on the card are text."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import slimgpt
from slimgpt import assets
from slimgpt.calibration.documents import hub_dataset
from slimgpt.calibration.evaluation_text import FOR_PEOPLE
from slimgpt.checkpoint import card, commands
from slimgpt.checkpoint.card_metadata import card_metadata
from slimgpt.cli import app
from slimgpt.errors import ExportError
from slimgpt.evaluation import perplexity
from slimgpt.exporting.gguf_tokenizer import check_normalizer
from tests.models.families import tiny_model, windows

FILES = ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "chat_template.json", "additional_chat_templates/tools.jinja")


def test_side_files_go_along_to_saved_and_exported_folders(tmp_path, tokenizer):
    dense = tmp_path / "dense"
    tiny_model("llama").save_pretrained(dense)
    tokenizer.save_pretrained(dense)
    (dense / "additional_chat_templates").mkdir()
    for name in FILES:
        (dense / name).write_text("{}")
    model, _ = slimgpt.load(str(dense))
    report = slimgpt.prune(model, None, ratio=0.3, device="cpu", calibration=windows())
    slim = slimgpt.save(model, tokenizer, report, tmp_path / "slim")
    slimgpt.export(slim, tmp_path / "padded", "padded", check=False)
    slimgpt.prune_folder(
        str(dense), tmp_path / "streamed", ratio=0.3, device="cpu", calibration=windows(), distill="off", evaluate=False
    )
    for folder in (slim, tmp_path / "padded", tmp_path / "streamed"):
        assert all((folder / name).is_file() for name in FILES), folder


@pytest.mark.parametrize(
    ("base", "heading", "code"),
    [
        ("org/model", "org/model", "`org/model`"),
        ("/home/me/secret/m[v2]", r"m\[v2\]", "`m[v2]`"),
        ("a`b<i>\n# c", r"a\`b\<i\> \# c", "`` a`b<i> # c ``"),
    ],
)
def test_base_names_are_text_on_the_card(base, heading, code):
    name = commands.public_name(base)
    assert (card._plain(name), card._code(name)) == (heading, code)


def test_gguf_refuses_what_changes_ids():
    level = {"type": "ByteLevel", "add_prefix_space": False}
    assert check_normalizer({"normalizer": None, "pre_tokenizer": level}) == []
    both = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert "NFC" in check_normalizer({"normalizer": both, "pre_tokenizer": level})[0]
    with pytest.raises(ExportError, match="Lowercase"):
        check_normalizer({"normalizer": {"type": "Lowercase"}, "pre_tokenizer": level})
    with pytest.raises(ExportError, match="add_prefix_space"):
        check_normalizer({"normalizer": None, "pre_tokenizer": {**level, "add_prefix_space": True}})


def test_several_chat_templates_are_written_by_name(tmp_path, tokenizer):
    from gguf import GGUFReader, GGUFWriter

    from slimgpt.exporting.gguf_tokenizer import add_tokenizer

    named = {"default": "D", "tool_use": "T"}
    before, tokenizer.chat_template = tokenizer.chat_template, named
    try:
        writer = GGUFWriter(tmp_path / "x.gguf", "llama")
        add_tokenizer(writer, tokenizer, len(tokenizer), "gpt-2")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    finally:
        tokenizer.chat_template = before
    fields = GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "D"
    assert fields["tokenizer.chat_template.tool_use"].contents() == "T"


BASE_CARD = (
    "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [de, en]\ntags: [llama]\n---\n\n# Base\n"
)


def front(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


@pytest.fixture
def base(tmp_path, tokenizer):
    """A dense folder with a card."""
    folder = tmp_path / "secret" / "dense"
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture
def slim(base, text_file, tmp_path):
    """A slim folder made from it, through files."""
    slimgpt.prune_folder(str(base), tmp_path / "slim", ratio=0.3, calibration=str(text_file), num_samples=8, seq_len=24,
                         device="cpu")  # fmt: skip
    return tmp_path / "slim"


def test_the_head_has_the_licence_of_the_base_and_the_figures(slim, base, text_file, tmp_path):
    values, report = front(slim), json.loads((slim / "slimgpt.json").read_text())
    assert {key: values[key] for key in ("license", "license_name", "license_link", "language", "tags")} == {
        "license": "other", "license_name": "tiny", "license_link": "LICENSE", "language": ["de", "en"],
        "tags": ["slimgpt", "pruned"],
    }  # fmt: skip
    assert not {"base_model", "base_model_relation", "datasets"} & set(values)  # nothing of it is on the hub
    assert report["calibration"]["dataset"] is None
    (index,) = values["model-index"]
    metrics = {(r["dataset"]["name"], m["type"]): m["value"] for r in index["results"] for m in r["metrics"]}
    for name, title in FOR_PEOPLE.items():
        measured = report["divergence"][name]
        assert metrics[title, "perplexity"] == measured["perplexity"]["after"]
        assert metrics[title, "kl_divergence"] == measured["kl"]["mean"]
    text = (slim / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(text_file.parent) not in text
    assert text_file.name in text
    model, tokenizer = slimgpt.load(str(base))
    whole = slimgpt.prune(model, tokenizer, ratio=0.3, calibration=str(text_file), num_samples=8, seq_len=24)
    slimgpt.save(model, tokenizer, whole, tmp_path / "memory")
    assert front(tmp_path / "memory") | {"model-index": 0} == values | {"model-index": 0}
    assert ModelCard((slim / "README.md").read_text()).data.eval_results  # the hub reads it


def test_evaluate_adds_its_figures_and_keeps_what_exports_left(slim, base, text_file):
    slimgpt.export(slim, slim.parent / "padded", "padded", check=False)
    words = ["evaluate", slim, "--text", text_file, "--window", 32, "--max-tokens", 256, "--device", "cpu"]
    for more in ([], ["--against", base], ["--against", base]):
        done = CliRunner().invoke(app, [str(word) for word in (*words, *more, "--update-card")])
        assert done.exit_code == 0, done.output
    model, tokenizer = slimgpt.load(str(slim))
    measured = slimgpt.evaluate(model, tokenizer, str(text_file), window=32, max_tokens=256, against=str(base))
    (result,) = json.loads((slim / "slimgpt.json").read_text())["evaluation"]["results"]  # the newer of the same
    assert result["perplexity"] == pytest.approx(measured.perplexity, rel=1e-5)
    assert result["kl_divergence"] == pytest.approx(measured.divergence.kl.mean, rel=1e-5)
    assert result["text"] == text_file.name
    text = (slim / "README.md").read_text()
    assert f"perplexity {measured.perplexity:.2f}, KL divergence from dense {measured.divergence.kl.mean:.3f}" in text
    assert text.count("## Exports") == text.count("`padded` (padded") == 1
    assert str(slim.parent) not in text
    assert front(slim)["license_name"] == "tiny"
    names = [result["dataset"]["name"] for result in front(slim)["model-index"][0]["results"]]
    assert text_file.name in names
    done = CliRunner().invoke(app, ["evaluate", str(base), "--text", str(text_file), "--update-card"])
    assert (done.exit_code, "has no slimgpt.json" in " ".join(done.output.split())) == (2, True)


@pytest.mark.parametrize("kind", ["bytes", "pipe", "folder"])
def test_a_card_that_cannot_be_read_is_said_before_the_work(kind, slim, text_file, tmp_path):
    card = slim / "README.md"
    card.unlink()
    {"bytes": lambda: card.write_bytes(b"\xff"), "pipe": lambda: os.mkfifo(card), "folder": card.mkdir}[kind]()
    words = ["evaluate", slim, "--text", text_file, "--window", 32, "--max-tokens", 64, "--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in (*words, "--update-card")])
    assert done.exit_code == 2
    assert "perplexity" not in done.output
    message = "must be text in UTF-8" if kind == "bytes" else "is no regular file"
    assert message in " ".join(done.stderr.split())
    report = slimgpt.export(slim, tmp_path / "padded", "padded", check=False)
    assert any("does not name this export" in note and message in note for note in report.notes)


def test_the_card_of_somebody_elses_model_stays(base, tmp_path):
    slimgpt.export(base, tmp_path / "padded", "padded", check=False)
    assert (base / "README.md").read_text() == BASE_CARD
    assert "`padded` (padded" in (tmp_path / "padded" / "README.md").read_text()


def test_figures_of_an_adapter_are_not_put_on_the_card_of_its_base(slim, base, text_file, tmp_path):
    model = get_peft_model(slimgpt.load(str(slim))[0], LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(slim)
    model.save_pretrained(tmp_path / "adapter")
    before = (slim / "slimgpt.json").read_bytes(), (slim / "README.md").read_bytes()
    text = ["--text", text_file, "--window", 32, "--update-card"]
    for words in (
        ["evaluate", tmp_path / "adapter", *text],
        ["compare", base, tmp_path / "adapter", *text, "--no-speed", "--out", tmp_path / "out"],
    ):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 2, done.output
        assert "has no slimgpt.json" in done.output or "none of the models to compare" in done.output
    assert before == ((slim / "slimgpt.json").read_bytes(), (slim / "README.md").read_bytes())


def test_after_recovery_the_figures_are_those_of_the_recovered_model(slim, base, text_file, tmp_path):
    slimgpt.recover(slim, tmp_path / "recovered", str(text_file), teacher=str(base), method="distill", max_steps=2,
                    max_length=24, batch_size=8, device="cpu", bf16=False, evaluations=1)  # fmt: skip
    report = json.loads((tmp_path / "recovered" / "slimgpt.json").read_text())
    (result,) = report["evaluation"]["results"]
    model, tokenizer = slimgpt.load(str(tmp_path / "recovered"))
    dense, _ = slimgpt.load(str(base))
    expected = perplexity(model, tokenizer, assets.general_text(), 64, 4096, against=dense)
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert result["kl_divergence"] == pytest.approx(expected.divergence.kl.mean, rel=1e-4)
    values = front(tmp_path / "recovered")
    metrics = {m["type"]: m["value"] for r in values["model-index"][0]["results"] for m in r["metrics"]}
    assert len(values["model-index"][0]["results"]) == 1
    assert metrics["perplexity"] == result["perplexity"]
    assert (values["license_name"], report["recovery"][0]["data"]["datasets"]) == ("tiny", [])
    assert str(text_file.parent) not in (tmp_path / "recovered" / "README.md").read_text()


@pytest.mark.parametrize(
    ("base_model", "dataset", "origin", "expected"),
    [
        ("org/model", "org/text", None, ("org/model", "finetune", ["org/text"])),
        ("model", None, "/cache/models--org--model/snapshots/0a1b", ("org/model", "finetune", None)),
        ("/home/me/model", None, "/home/me/model", (None, None, None)),
        ("SmolLM2-135M-Instruct", None, None, ("HuggingFaceTB/SmolLM2-135M-Instruct", "finetune", None)),
    ],
)
def test_names_on_the_hub_are_in_the_head(base_model, dataset, origin, expected):
    model = tiny_model("llama")
    report = slimgpt.prune(model, None, ratio=0.3, device="cpu", calibration=windows())
    report = replace(report, base_model=base_model, calibration={**report.calibration, "dataset": dataset})
    values = yaml.safe_load(card_metadata(report, origin))
    assert tuple(values.get(key) for key in ("base_model", "base_model_relation", "datasets")) == expected
    assert "/home" not in card_metadata(report, origin)


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "no head", "---\n- a\n---\n"])
def test_a_base_card_that_cannot_be_read_is_passed_over(text, base):
    (base / "README.md").write_text(text)
    report = slimgpt.prune(tiny_model("llama"), None, ratio=0.3, device="cpu", calibration=windows())
    assert "license" not in yaml.safe_load(card_metadata(report, base))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/text", "org/text"), ("org/text:en:train", "org/text"), ("demo", None), ("tensor", None),
        ("./rows", None), ("/home/me/x.txt", None), ("rows.jsonl.gz", None),
    ],
)  # fmt: skip
def test_data_sets_on_the_hub_are_told_from_files(source, expected):
    assert hub_dataset(source) == expected
