"""Named texts, leaks, and numbers hidden in long texts."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

import slimgpt
from slimgpt.errors import CalibrationError, UsageError
from slimgpt.evaluation import contamination_note, passkey, read_text
from slimgpt.evaluation.corpora import CORPORA, Text
from slimgpt.evaluation.loglikelihood import log_likelihoods
from slimgpt.evaluation.passkey_retrieval import DEPTHS, _question
from slimgpt.runtime.thresholds import other_thresholds
from tests.models.families import tiny_model

HUB_ROWS = ["", " = Robert Boulter = \n", "", " Robert Boulter is an English actor . \n", " He had a role . \n"]
"""WikiText-2 rows as the hub has them."""

FILE = " \n = Robert Boulter = \n \n Robert Boulter is an English actor . \n He had a role . \n"
"""The same as wiki.test.raw has them."""


def test_wikitext_from_the_file_is_the_text_of_the_literature(tmp_path, monkeypatch):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(FILE)
    text = read_text("wikitext2", tmp_path)
    assert text.content == "\n\n".join(HUB_ROWS)
    assert text.joining == r"rows joined with '\n\n', from wiki.test.raw"
    asked = {}

    def load_dataset(**arguments):
        asked.update(arguments)
        return Dataset.from_dict({"text": HUB_ROWS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_text("wikitext2").content == text.content
    assert (asked["path"], asked["name"], asked["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


def test_c4_takes_so_many_rows_and_windows(tmp_path, tokenizer):
    (tmp_path / "c4").mkdir()
    rows = [json.dumps({"text": f"Document {i} runs past the old mill and the sea."}) for i in range(1200)]
    (tmp_path / "c4" / "c4_validation.jsonl").write_text("\n".join(rows))
    text = read_text("c4", tmp_path)
    assert text.content.startswith("Document 0 runs past the old mill and the sea. Document 1 ")
    assert "Document 1099 " in text.content
    assert "Document 1100 " not in text.content
    result = slimgpt.evaluate(tiny_model("llama"), tokenizer, "c4", window=16, data_dir=tmp_path)
    assert result.tokens == CORPORA["c4"].max_windows * 16


def test_texts_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(CalibrationError, match="has no ptb"):
        read_text("ptb", tmp_path)
    with pytest.raises(CalibrationError, match="cannot read the text"):
        read_text(str(tmp_path / "nothing.txt"))
    monkeypatch.setattr("datasets.load_dataset", lambda **_: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(CalibrationError, match="no route"):
        read_text("wikitext2")


def test_lines_end_at_line_ends_only(tmp_path):
    (tmp_path / "c4").mkdir()
    rows = ["one\u2028row", "a form\x0cfeed"]
    lines = [json.dumps({"text": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "c4" / "c4_validation.jsonl").write_text("\n".join(lines))
    assert read_text("c4", tmp_path).content == " ".join(rows)
    (tmp_path / "wiki.test.raw").write_text(" one\x0crow \n \n two\x85 rows \n")
    assert read_text("wikitext2", tmp_path).content == "\n\n".join([" one\x0crow \n", "", " two\x85 rows \n"])
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text(" one\u2028row \n two \n")
    assert read_text("ptb", tmp_path).content == "one\u2028row two"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.NDJSON"])
def test_of_a_file_of_rows_the_texts_are_measured(name, tmp_path):
    rows = [{"text": "The river runs.", "id": 1}, {"text": None}, {"text": "On to the sea."}]
    text = json.dumps(rows) if name == "rows.json" else "\n".join(json.dumps(row) for row in rows)
    (tmp_path / name).write_text(text)
    assert read_text(str(tmp_path / name)).content == "The river runs.\n\nOn to the sea."
    assert "texts of the rows" in read_text(str(tmp_path / name)).joining
    chat = [{"messages": [{"role": "user", "content": "text"}]}]
    (tmp_path / name).write_text(json.dumps(chat if name == "rows.json" else chat[0]))
    with pytest.raises(CalibrationError, match=rf"{name}, .* 1 is a conversation; perplexity is measured on rows with"):
        read_text(str(tmp_path / name))


def test_a_text_file_is_read_without_its_mark_and_only_if_it_ends(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("The river.\n", encoding="utf-8-sig")
    assert read_text(str(file)).content == "The river.\n"
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(CalibrationError, match=r"a\.txt is no regular file"):
        read_text(str(file))


def calibrated(source):
    return {"calibration": {"source": str(source), "num_samples": 8}}


def test_leaks_by_name():
    wikitext, c4 = Text("wikitext2", ""), Text("c4", "")
    assert contamination_note(None, wikitext) is None
    assert contamination_note(calibrated("allenai/c4:en"), wikitext) is None
    assert "WikiText" in contamination_note(calibrated("Salesforce/wikitext:wikitext-2-raw-v1:train"), wikitext)
    assert "WikiText" in contamination_note(calibrated("/somewhere/wiki.train.raw.txt"), wikitext)
    assert "C4" in contamination_note(calibrated("/data/c4/c4_train.jsonl"), c4)
    assert contamination_note(calibrated("/data/mac4/x.txt"), c4) is None
    assert "other speeches" in contamination_note(calibrated("demo"), Text("demo", ""))
    trained = {**calibrated("demo"), "recovery": [{"settings": {"data": ["alpaca.json", "wikitext:train"]}}]}
    assert contamination_note(trained, wikitext).startswith("trained on")


def test_leaks_by_content(tmp_path):
    lines = [f"Sentence {i} of a book that is long enough not to be anywhere else by chance." for i in range(40)]
    seen = tmp_path / "book.txt"
    seen.write_text("\n".join(lines[:20]))
    assert contamination_note(calibrated(seen), Text("a.txt", "\n".join(lines[20:]))) is None
    assert "50% of this text" in contamination_note(calibrated(seen), Text("b.txt", "\n".join(lines)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "\n".join(lines)}))
    assert "100% of this text" in contamination_note(calibrated(rows), Text("b.txt", "\n".join(lines)))


def test_the_leak_is_said_in_the_line_of_the_figure(dense_folder, text_file, tmp_path):
    from tests.cli.test_command_line import run

    slim, result = tmp_path / "slim", tmp_path / "result.json"
    small = ["--calibration", text_file, "--num-samples", 8, "--seq-len", 24, "--device", "cpu"]
    assert run("prune", dense_folder, slim, *small).exit_code == 0
    done = run("evaluate", slim, "--text", text_file, "--window", 32, "--max-tokens", 640, "--json", result)
    line = next(line for line in done.output.splitlines() if line.startswith("perplexity"))
    assert "calibrated on 100% of this text" in line
    assert "100%" in json.loads(result.read_text())["leak"]
    assert "calibrated" not in run("evaluate", dense_folder, "--text", text_file, "--window", 32).output


def test_passkey_questions_have_the_length_and_the_number(tokenizer):
    for depth in (0.0, 0.5, 1.0):
        context, answer = _question(tokenizer, 700, depth, 12345)
        assert len(context) + len(answer) == 700
    with pytest.raises(UsageError, match="has no room"):
        _question(tokenizer, 20, 0.5, 12345)


def test_passkey_counts_what_greedy_decoding_gives(tokenizer, monkeypatch):
    """A model that knows the answers of the first depth only."""
    model = tiny_model("llama", max_position_embeddings=800)

    def answer_first(model, requests, max_length, _):
        real = log_likelihoods(model, requests[:1], max_length)
        assert len(real) == 1
        return [(0.0, index < 3) for index, _ in enumerate(requests)]

    monkeypatch.setattr("slimgpt.evaluation.passkey_retrieval.log_likelihoods", answer_first)
    passkeys = passkey(model, tokenizer, [700], trials=3)
    assert passkeys.by_depth == {700: [1.0, *[0.0] * (DEPTHS - 1)]}
    assert passkeys.found == {700: pytest.approx(1 / DEPTHS)}
    with pytest.raises(UsageError, match="longer than the model's context"):
        passkey(model, tokenizer, [801])


def test_passkey_answers_are_those_of_generate(tokenizer):
    model = tiny_model("llama", max_position_embeddings=800)
    context, _ = _question(tokenizer, 700, 0.5, 12345)
    ids = torch.tensor([context])
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[0, -5:]
    assert log_likelihoods(model, [(context, greedy.tolist())], 800)[0][1]


def test_a_text_without_measure_is_refused(tmp_path):
    file = tmp_path / "one-line.txt"
    file.write_text("x" * 1000)
    with other_thresholds(longest_text=1000):
        assert len(read_text(str(file)).content) == 1000
    file.write_text("x" * 1001)
    with (
        other_thresholds(longest_text=1000),
        pytest.raises(CalibrationError, match=r"one-line\.txt has more than 1,000 characters"),
    ):
        read_text(str(file))


def test_rows_without_measure_are_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "x" * 400}) + "\n")
    with other_thresholds(longest_text=1000):
        assert read_text(str(file)).content == "x" * 400
        file.write_text(file.read_text() * 3)
        with pytest.raises(CalibrationError, match=r"rows\.jsonl has more than 1,000 characters"):
            read_text(str(file))
    assert len(read_text(str(file)).content) == 3 * 400 + 2 * 2
