"""The table of generated answers: scores of the package itself, and answers that are written once."""

from __future__ import annotations

import json

import generation
import pytest
from typer.testing import CliRunner

import slimgpt
from slimgpt.evaluation import evaluate_tasks
from tests.evaluation.test_generated_tasks import IFEVAL
from tests.models.families import sharpened_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Two models that say different things, and rows of which one needs NLTK's model."""
    root = tmp_path_factory.mktemp("models")
    for name, factor in (("dense", 3), ("slim", 2)):
        model = sharpened_model(factor, max_position_embeddings=256)
        model.generation_config.eos_token_id = [*range(0, len(tokenizer), 9)]
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "rows/ifeval").mkdir(parents=True)
    sentences = {**IFEVAL[0], "instruction_id_list": ["length_constraints:number_sentences"]}
    sentences["kwargs"] = [{"relation": "at least", "num_sentences": 2}]
    prompts = ("The river runs past the old mill", "She counted the heads", "the sea is small and old")
    others = [{**row, "prompt": prompt} for row, prompt in zip(IFEVAL, prompts)]
    lines = [json.dumps(row) + "\n" for row in (sentences, *others)]
    (root / "rows/ifeval/input_data.jsonl").write_text("".join(lines), encoding="utf-8")
    return root


def test_the_table_has_the_package_s_scores_and_goes_on(folders, tmp_path, monkeypatch):
    pytest.importorskip("immutabledict")
    pytest.importorskip("langdetect")
    monkeypatch.setattr("nltk.download", lambda *_, **__: None)
    # The task asks for more tokens than these models have positions.
    harness = "slimgpt.evaluation.harness.normalize_gen_kwargs"
    monkeypatch.setattr(harness, lambda *_: {"until": [], "max_gen_toks": 24, "do_sample": False})
    words = ["--data", folders / "rows", "--work", tmp_path / "work", "--out", tmp_path / "table", "--batch-size", 2]
    words += ["--model", f"dense={folders / 'dense'}", "--model", f"33%={folders / 'slim'}", "--no-chat-template"]
    words += ["--leave-out-sentences", "--device", "cpu"]
    write, sizes = generation.generate_answers, []

    def counted(model, tokenizer, prompts, *rest, **named):
        if len(sizes) == 3:
            raise KeyboardInterrupt
        sizes.append(len(prompts))
        return write(model, tokenizer, prompts, *rest, **named)

    monkeypatch.setattr(generation, "generate_answers", counted)
    assert run(words).exit_code != 0
    assert sizes == [2, 1, 2]
    kept = sorted(file.stat().st_size for file in (tmp_path / "work").glob("*.jsonl"))
    assert len(kept) == 2
    torn = max((tmp_path / "work").glob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    with torn.open("a") as file:
        file.write('{"key": "ha')
    sizes.clear()
    assert run(words).exit_code == 0
    assert sizes == [1]  # what the slim model had not written
    values = json.loads((tmp_path / "table.json").read_text())
    assert values["settings"]["left_out"] == 1
    for row, name in zip(values["rows"], ("dense", "slim")):
        scores = evaluate_tasks(
            *slimgpt.load(str(folders / name), device="cpu"), "ifeval", data_dir=tmp_path / "work/rows"
        )
        assert row["metrics"] == scores.scores["ifeval"]
        assert row["endings"] == scores.to_json()["endings"]["ifeval"]
    text = (tmp_path / "table.md").read_text()
    assert "| dense | " in text
    assert "| 33% | " in text
    assert "(1 rows left out" in text
    sizes.clear()
    assert run(words).exit_code == 0
    assert sizes == []


def run(words):
    app = generation.typer.Typer()
    app.command()(generation.main)
    return CliRunner().invoke(app, [str(word) for word in words])
