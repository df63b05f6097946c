"""Text in every form becomes the windows that were asked for, or an error that says what is missing."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import slimgpt
from slimgpt.calibration import digest, prefix_ids, read_documents, sample_windows
from slimgpt.errors import CalibrationError
from tests.conftest import SENTENCES
from tests.families import tiny_model, windows

CHAT = [{"role": "user", "content": SENTENCES[0]}, {"role": "assistant", "content": SENTENCES[1]}]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_every_format_and_a_folder_of_them(tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCES[0])
    jsonl(tmp_path / "b.jsonl", [{"text": SENTENCES[1]}, {"messages": CHAT}])
    pq.write_table(pa.table({"text": [SENTENCES[2], SENTENCES[3]], "id": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "readme.md").write_text("not text for calibration")
    assert list(read_documents(str(tmp_path / "a.txt"))) == [SENTENCES[0]]
    assert list(read_documents(str(tmp_path / "b.jsonl"))) == [SENTENCES[1], CHAT]
    assert list(read_documents(str(tmp_path / "c.parquet"))) == SENTENCES[2:]
    assert list(read_documents(str(tmp_path))) == [SENTENCES[0], SENTENCES[1], CHAT, *SENTENCES[2:]]


def test_a_long_text_file_is_cut_at_line_ends_and_loses_nothing(tmp_path):
    text = "".join(f"line {i}\n" for i in range(30_000))
    (tmp_path / "long.txt").write_text(text)
    parts = list(read_documents(str(tmp_path / "long.txt")))
    assert len(parts) > 2
    assert "".join(parts) == text
    assert all(part.endswith("\n") for part in parts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": ', r"a\.jsonl, line 2 is no JSON"),
        ("a.jsonl", '{"body": "text", "id": 3}\n', r"line 1 has no `text`, no `messages`, .* it has \['body', 'id'\]"),
        ("a.parquet", "no parquet", "cannot read"),
        ("a.csv", "text", "none of .txt"),
    ],
)
def test_unreadable_text(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=message):
        list(read_documents(str(tmp_path / name)))


def test_no_text(tmp_path):
    with pytest.raises(CalibrationError, match="holds no"):
        list(read_documents(str(tmp_path)))
    with pytest.raises(CalibrationError, match="no such text"):
        list(read_documents(str(tmp_path / "nothing.jsonl")))


def test_windows_are_the_tokens_of_the_text(tokenizer, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": SENTENCES[0]}])
    ids = tokenizer(SENTENCES[0])["input_ids"]
    expected = [*ids, tokenizer.eos_token_id][: len(ids) // 2 * 2]
    found = sample_windows(tokenizer, str(file), 2, len(expected) // 2)
    assert found.flatten().tolist() == expected
    assert found.dtype == torch.long


def test_windows_follow_the_seed(tokenizer, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{sentence} {i}"} for i in range(50) for sentence in SENTENCES])
    first, again, other = (sample_windows(tokenizer, str(file), 5, 16, seed) for seed in (0, 0, 1))
    assert first.shape == (5, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_little_text_gives_both_numbers(tokenizer, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": SENTENCES[0]}])
    there = len(tokenizer(SENTENCES[0])["input_ids"]) + 1
    with pytest.raises(CalibrationError, match=rf"gives {there} tokens, but 10 windows of 50 need 500"):
        sample_windows(tokenizer, str(file), 10, 50)


def test_chat_goes_through_the_template(tokenizer, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(CalibrationError, match="no chat template"):
        sample_windows(tokenizer, str(file), 1, 8)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    text = f"user: {SENTENCES[0]}\nassistant: {SENTENCES[1]}\n"
    assert sample_windows(chatty, str(file), 1, 20).tolist()[0] == tokenizer(text)["input_ids"][:20]


def test_every_window_starts_as_the_tokenizer_starts_a_text(tokenizer, starting, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": sentence} for sentence in SENTENCES])
    assert prefix_ids(tokenizer) == []
    assert prefix_ids(starting) == [2]
    found = sample_windows(starting, str(file), 3, 10)
    assert found.shape == (3, 10)
    assert found[:, 0].tolist() == [2, 2, 2]
    assert 2 not in found[:, 1:]
    with pytest.raises(CalibrationError, match="no room"):
        sample_windows(starting, str(file), 3, 1)


def test_digest_names_the_ids():
    ids = windows()
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 97
    assert digest(ids) == digest(ids.clone()) != digest(changed)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (windows().float(), "LongTensor"),
        (windows()[0], "LongTensor"),
        (windows()[:0], "LongTensor"),
        (windows() + 97, "outside the vocabulary"),
        (windows() - 1, "outside the vocabulary"),
        ("demo", "without a tokenizer"),
    ],
)
def test_ready_ids_are_checked(calibration, message):
    model = tiny_model("llama")
    with pytest.raises(CalibrationError, match=message):
        slimgpt.prune(model, None, calibration=calibration, device="cpu")
