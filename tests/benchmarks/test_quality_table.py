"""The quality table's texts, rows and report, on a tiny model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from baselines.units import decoder_parameters
from quality_table import run as table_run
from quality_table.models import multi_head, run_in
from quality_table.report import share_of_paper, table, write
from quality_table.rows import DENSE, Result, Row, Store
from quality_table.run import Bench, Settings
from quality_table.texts import Texts

import slimgpt
from slimgpt.errors import CalibrationError, PlanError
from slimgpt.evaluation.tasks import TaskScores
from tests.models.families import tiny_model, windows

TINY = (("wikitext2", 8), ("wikitext2", 16), ("c4", 16))


@pytest.fixture
def bench(data_folder, dense_folder, tmp_path, monkeypatch) -> Bench:
    """The tiny Llama in the place of a model that the user names, and short windows."""
    monkeypatch.setattr(table_run, "TEXTS", TINY)
    settings = Settings(num_samples=6, seq_len=16, max_tokens=160, paths={"gemma3": str(dense_folder)})
    return Bench(Texts(data_folder), Store(tmp_path / "rows"), settings)


def test_multi_head_form_computes_the_same_logits():
    model, ids = tiny_model("llama"), windows(3)
    wide = multi_head(model)
    assert wide.config.num_key_value_heads == wide.config.num_attention_heads
    torch.testing.assert_close(wide(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_running_in_bf16_leaves_rotary_frequencies_exact():
    model = tiny_model("llama")
    exact = model.model.rotary_emb.inv_freq.clone()
    run_in(model, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_no_text_is_used_twice(data_folder):
    texts = Texts(data_folder)
    calibration = set(texts.documents("c4"))
    validation = set(texts.held_out("c4", True).split("\n\n"))
    test = set(texts.held_out("c4", False).split("\n\n"))
    assert (len(calibration), len(validation), len(test)) == (700, 100, 200)
    assert len(calibration | validation | test) == 1000
    articles, held_out = texts.documents("wikitext2"), texts.held_out("wikitext2", True)
    whole = (data_folder / "wikitext2/wiki.train.raw.first1MB.txt").read_text()
    assert "".join(articles) + held_out == whole
    assert all(article.startswith(" = Article") for article in articles)


def test_held_out_texts_do_not_move_with_the_seed(data_folder, tokenizer):
    texts = Texts(data_folder)
    first, again, other = (texts.windows(tokenizer, "c4", 4, 16, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = random.getstate()
    texts.held_out("c4", False)
    assert random.getstate() == state


def test_a_missing_text_is_named_before_any_model_is_brought(tmp_path):
    bench = Bench(Texts(tmp_path), Store(tmp_path), Settings())
    with pytest.raises(CalibrationError, match=r"no such text: .*c4_train_shard0_first1000\.jsonl"):
        bench.missing(Row("smollm2", "paper", 0.2))


def test_a_row_is_kept_and_taken_up_where_it_stopped(bench, monkeypatch):
    row = Row("gemma3", "paper", 0.3)
    taken: list[str] = []
    measure = Bench._measure

    def stops_at_the_second(self, model, tokenizer, name, *others):
        if len(taken) == 1:
            raise KeyboardInterrupt
        taken.append(name)
        return measure(self, model, tokenizer, name, *others)

    monkeypatch.setattr(Bench, "_measure", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        bench.work_out(row)
    assert bench.missing(row) == ["wikitext2@16", "c4@16"]
    first = bench.result(row).value("wikitext2@8")
    monkeypatch.setattr(Bench, "_measure", measure)
    result = bench.work_out(row)
    assert bench.missing(row) == []
    assert result.value("wikitext2@8") == first
    assert result.found["achieved"] == pytest.approx(0.3, abs=0.002)


def test_a_row_measures_what_the_package_measures(bench, data_folder, dense_folder):
    result = bench.work_out(Row("gemma3", "slimgpt", 0.3))
    model, tokenizer = slimgpt.load(str(dense_folder), dtype="float32")
    before = decoder_parameters(model)
    slimgpt.prune(model, None, 0.3, bench.windows(Row("gemma3", "slimgpt", 0.3)), batch_size=128)
    file = str(data_folder / "wikitext2/wiki.test.raw")
    expected = slimgpt.evaluate(model, tokenizer, file, window=16, max_tokens=160).perplexity
    assert result.value("wikitext2@16") == pytest.approx(expected, rel=1e-6)
    assert result.found["decoder_parameters"] == decoder_parameters(model)
    assert result.found["achieved"] == 1 - decoder_parameters(model) / before


def test_divergence_is_that_from_the_dense_model(bench, data_folder, dense_folder):
    bench.settings = replace(bench.settings, divergence=True)
    row = Row("gemma3", "slimgpt", 0.3)
    result = bench.work_out(row)
    dense, tokenizer = slimgpt.load(str(dense_folder), dtype="float32")
    slim, _ = slimgpt.load(str(dense_folder), dtype="float32")
    slimgpt.prune(slim, None, 0.3, bench.windows(row), batch_size=128)
    ids = tokenizer((data_folder / "wikitext2/wiki.test.raw").read_text(), return_tensors="pt")["input_ids"][0, :160]
    expected, base = (model(ids.view(-1, 16)).logits[:, :-1].double().log_softmax(-1) for model in (slim, dense))
    kl = (base.exp() * (base - expected)).sum(-1).mean()
    assert result.value("kl-wikitext2@16") == pytest.approx(kl.item(), rel=1e-4)
    assert not any(name.startswith("kl-") for name in bench.work_out(Row("gemma3", DENSE, 0.0)).measures)


def test_longer_texts_are_measured_again_and_other_calibration_is_another_row(bench):
    row = Row("gemma3", "magnitude", 0.3)
    bench.work_out(row)
    longer = Bench(bench.texts, bench.store, replace(bench.settings, max_tokens=320))
    assert len(longer.missing(row)) == 3
    changed = Row("gemma3", "magnitude", 0.3, changes=(("num_samples", 3),))
    assert bench.store.file(row, bench.decisive(row)) != bench.store.file(changed, bench.decisive(changed))
    assert len(bench.windows(changed)) == 3
    assert not bench.result(changed).measures


def test_rows_of_another_type_of_forward_passes_are_reported_and_said(bench, tmp_path):
    rows = [Row("gemma3", DENSE, 0.0), Row("gemma3", "paper", 0.3), Row("gemma3", "magnitude", 0.3)]
    other = Bench(bench.texts, bench.store, replace(bench.settings, dtype="bfloat16"))
    bench.work_out(rows[0])
    bench.work_out(rows[1])
    other.work_out(rows[1])
    other.work_out(rows[2])
    reported = [(row, bench.reported(row)) for row in rows]
    assert [result.settings["dtype"] for _, result in reported] == ["float32", "float32", "bfloat16"]
    assert other.reported(rows[1]).settings["dtype"] == "bfloat16"
    assert bench.missing(rows[2])
    head, _, *lines = table(reported, bench.settings, "gemma3")
    assert [line.split(" | ")[3] for line in (head, *lines)] == ["type", "float32", "float32", "bfloat16"]
    page = write(reported, [], bench.settings, tmp_path / "page")[0].read_text()
    assert "forward passes in bfloat16 or float32, as each row says" in page
    reported[2][1].found["versions"]["device"] = "NVIDIA H100"
    assert "| bfloat16 on NVIDIA H100 |" in table(reported, bench.settings, "gemma3")[-1]


def test_validation_is_measured_beside_the_test_texts(bench):
    row = Row("gemma3", DENSE, 0.0)
    bench.work_out(row)
    validation = Bench(bench.texts, bench.store, replace(bench.settings, validation=True))
    result = validation.work_out(row)
    assert set(result.measures) == {f"{t}{v}@{w}" for t, w in TINY for v in ("", "-validation")}
    assert result.value("wikitext2@16") != result.value("wikitext2-validation@16")


def test_a_refusal_of_the_method_is_the_packages_own_error(bench):
    with pytest.raises(PlanError):
        bench.work_out(Row("gemma3", "paper", 0.99))


def test_the_model_writes_its_own_calibration_text_once(bench):
    row = Row("gemma3", "paper", 0.3, changes=(("source", "auto"), ("num_samples", 5), ("seq_len", 48)))
    first = bench.windows(row)
    assert first.shape == (5, 48)
    again = Bench(bench.texts, bench.store, bench.settings)
    assert torch.equal(again.windows(row), first)
    assert len(set(map(tuple, first.tolist()))) == 5


def test_the_mean_of_the_tasks_can_be_added_to_a_finished_row(bench, monkeypatch):
    row = Row("gemma3", DENSE, 0.0)
    before = bench.work_out(row).value("c4@16")
    asked: dict[str, Any] = {}

    def tasks(*_, limit, data_dir, on_start):
        asked.update(limit=limit, data_dir=data_dir)
        on_start(3)(3)
        samples = {"boolq": [{"doc_id": 1, "acc": 0.0}, {"doc_id": 0, "acc": 1.0}]}
        return TaskScores({"boolq": {"acc": 0.5}}, 0.5, 0.5, None, {"limit": limit, "tasks": ["boolq"]}, samples)

    monkeypatch.setattr(table_run, "evaluate_tasks", tasks)
    more = Bench(bench.texts, bench.store, replace(bench.settings, tasks=7))
    assert more.missing(row) == ["tasks"]
    result = more.work_out(row)
    assert (result.value("tasks"), result.value("c4@16")) == (0.5, before)
    assert result.measures["tasks"]["right"] == {"boolq": "10"}
    assert asked == {"limit": 7, "data_dir": bench.texts.folder}
    assert more.missing(row) == []


def known(model: str, method: str, ratio: float, value: float, repair: bool = False) -> tuple[Row, Result]:
    """A finished row with all three perplexities the same."""
    row = Row(model, method, ratio, repair)
    pruning = {"achieved": ratio, "seconds": 5.0, "core_seconds": 9.0, "commit": "c", "versions": {"torch": "1"}}
    return row, Result(
        {}, {"dtype": "float32"}, pruning, {f"{name}@{w}": {"value": value} for name, w in (("wikitext2", 128), *REAL)}
    )


REAL = (("wikitext2", 512), ("c4", 512))


def test_the_share_of_papers_increase_is_of_log_perplexity():
    rows = [known("smollm2", DENSE, 0.0, 20.0), known("smollm2", "paper", 0.2, 80.0)]
    rows.append(known("smollm2", "slimgpt", 0.2, 40.0))
    assert share_of_paper(rows, *rows[2], "c4@512") == pytest.approx(math.log(2) / math.log(4))
    assert share_of_paper(rows, *rows[1], "c4@512") == pytest.approx(1)
    assert share_of_paper(rows, *rows[0], "c4@512") is None


def test_a_variant_is_compared_with_a_paper_row_that_is_not_shown():
    references = [known("smollm2", DENSE, 0.0, 20.0), known("smollm2", "paper", 0.2, 80.0)]
    lines = table([known("smollm2", "slimgpt", 0.2, 40.0)], Settings(), "smollm2", references)
    assert len(lines) == 3
    assert "| 0.50 | 0.50 |" in lines[-1]


def test_zero_shot_means_have_errors_and_are_compared_with_paper_question_by_question():
    rows = [known("smollm2", DENSE, 0.0, 20.0)]
    rows += [known("smollm2", name, 0.2, 80.0) for name in ("paper", "slimgpt", "wanda")]
    for (_, result), right in zip(rows, ("1001", "1100", "1110", None)):
        share = right.count("1") / 4 if right else 0.25
        scores = {
            "piqa": {"acc": 0.0, "acc_norm": share, "acc_norm_stderr": 0.25},
            "boolq": {"acc": share / 2, "acc_stderr": 0.25},
        }
        answers = {"right": {"piqa": right, "boolq": right}} if right else {}
        about = {"mean_acc": 0.0, "protocol": {"tasks": ["piqa", "boolq"]}}
        result.measures["tasks"] = {"value": 0.75 * share, "scores": scores, **about, **answers}
    head, _, *lines = table(rows, Settings(), "smollm2")
    place = head.split(" | ").index("zero-shot mean")
    assert head.split(" | ")[place + 1] == "without BoolQ"
    # One of four questions more: the differences are 0, 0, 1, 0, whose standard deviation is 0.5.
    both = ["0.375 ± 0.177", "0.562 ± 0.177 (+0.250 ± 0.177)", "0.188 ± 0.177"]
    cells = ["0.500 ± 0.250", "0.750 ± 0.250 (+0.250 ± 0.250)", "0.250 ± 0.250"]
    assert [line.split(" | ")[place] for line in lines[1:]] == both
    assert [line.split(" | ")[place + 1] for line in lines[1:]] == cells
    # Two and three of the dense model's four answers changed sides; it has none of its own to set beside them.
    assert [line.split(" | ")[place + 2] for line in lines] == ["", "50.0%", "75.0%", ""]


def test_the_report_has_every_row_the_repaired_ones_as_columns_and_marks_unequal_sizes(tmp_path):
    rows = [
        known("smollm2", DENSE, 0.0, 20.0),
        known("smollm2", "paper", 0.2, 80.0),
        known("smollm2", "wanda", 0.2, 90.0),
        known("smollm2", "wanda", 0.2, 61.25, repair=True),
    ]
    rows[2][1].found["achieved"] = 0.21
    lines = table(rows, Settings(), "smollm2")
    assert len(lines) == 2 + 3
    assert "21.00% (!)" in lines[-1]
    assert lines[-1].count("61.25") == 2
    assert len({line.count("|") for line in lines}) == 1
    files = write(rows, [], Settings(), tmp_path / "quality")
    assert [file.name for file in files] == ["quality.md", "quality.json", "quality-ratio.png", "quality-seconds.png"]
    assert len(json.loads(files[1].read_text())["rows"]) == 4
    assert all(file.stat().st_size > 0 for file in files)


def test_rows_are_chosen_by_pattern_or_part_of_their_name():
    row = Row("smollm2", "flap", 0.2, repair=True)
    assert row.name == "smollm2/flap+repair/0.20"
    assert row.matches("flap")
    assert row.matches("smollm2/*/0.20")
    assert not row.matches("smollm2/*/0.5*")
