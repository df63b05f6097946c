"""Text in every form becomes the windows that were asked for, or an error that says what is missing."""

import copy
import gzip
import io
import json
import os
import signal
import sys
import threading
import time
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import slimgpt
from slimgpt.calibration import cut_windows, digest, documents, prefix_ids, read_documents, sample_windows
from slimgpt.errors import CalibrationError, UsageError
from slimgpt.runtime.thresholds import other_thresholds
from slimgpt.runtime.time_limit import time_limit
from tests.conftest import SENTENCES
from tests.models.families import tiny_model, windows

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
    windows = sample_windows(tokenizer, str(file), 2, len(expected) // 2)
    assert windows.flatten().tolist() == expected
    assert windows.dtype == torch.long


def test_windows_follow_the_seed(tokenizer, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{sentence} {i}"} for i in range(50) for sentence in SENTENCES])
    first, again, other = (sample_windows(tokenizer, str(file), 5, 16, seed) for seed in (0, 0, 1))
    assert first.shape == (5, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_too_little_text_gives_both_numbers(tokenizer, tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": SENTENCES[0]}])
    tokens = len(tokenizer(SENTENCES[0])["input_ids"]) + 1
    with pytest.raises(CalibrationError, match=rf"gives {tokens} tokens, but 10 windows of 50 need 500"):
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
    windows = sample_windows(starting, str(file), 3, 10)
    assert windows.shape == (3, 10)
    assert windows[:, 0].tolist() == [2, 2, 2]
    assert 2 not in windows[:, 1:]
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


def rows_of(tmp_path, *rows):
    return list(read_documents(str(jsonl(tmp_path / "rows.jsonl", rows))))


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_turns_of_sharegpt_become_messages(field, tmp_path):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": SENTENCES[0]},
        {"from": "gpt", "value": SENTENCES[1]},
    ]
    assert rows_of(tmp_path, {"id": 3, field: turns}) == [[{"role": "system", "content": "Be brief."}, *CHAT]]


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "The river "}, {"type": "text", "text": "runs."}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    (messages,) = rows_of(tmp_path, {"messages": [{"role": "user", "content": parts}, call]})
    assert messages == [{"role": "user", "content": "The river runs."}, call]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user"}], r"line 2, message 1 has no text in `content` or `value` \(it has \['role'\]\)"),
        ([CHAT[0], {"role": "assistant", "content": None}], "line 2, message 2 has no text"),
        ([{"content": "text"}], "line 2, message 1 has no `role` and no `from`"),
        (["text"], "line 2, message 1 is str"),
        ([], "line 2 has a conversation without a message"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "message 1 has a part of type 'image",
        ),
        ([{"role": "user", "content": [3]}], "message 1 has a part of type 'int'"),
    ],
)
def test_messages_without_text_are_refused_by_file_and_row(turns, message, tmp_path):
    with pytest.raises(CalibrationError, match=rf"rows\.jsonl, .*{message}|rows\.jsonl, {message}"):
        rows_of(tmp_path, {"text": "fine"}, {"messages": turns})


def test_null_rows_are_left_out(tmp_path):
    assert rows_of(tmp_path, None, {"text": None}, {"text": "a", "id": None}, {"messages": None, "text": None}) == ["a"]
    with pytest.raises(CalibrationError, match=r"it has \['id'\]"):
        rows_of(tmp_path, {"id": None})


def test_half_a_pair_of_surrogates_is_refused_by_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\u00e9"}\n{"text": "\\ud800"}\n')
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line 2 cannot be read.*surrogates"):
        list(read_documents(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(name, tmp_path):
    text = {"a.txt": "plain", "a.jsonl": '{"text": "plain"}', "a.json": '[{"text": "plain"}]'}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert list(read_documents(str(tmp_path / name))) == ["plain"]


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.jsonl.gz", "a.NDJSON.GZ", "v1.2.jsonl"])
def test_other_endings_of_json_lines(name, tmp_path):
    content = json.dumps({"text": "one\u2028line"}, ensure_ascii=False).encode() + b"\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    (tmp_path / "v1").mkdir()
    assert list(read_documents(str(tmp_path / name))) == ["one\u2028line"]
    assert list(read_documents(str(tmp_path))) == ["one\u2028line"]


def test_zstd_needs_its_module(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(b"packed")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(CalibrationError, match=r"a\.txt\.zst is packed with zstd: pip install zstandard"):
        list(read_documents(str(tmp_path / "a.txt.zst")))
    opened = types.SimpleNamespace(open=lambda *_, **__: io.StringIO("unpacked"))
    monkeypatch.setitem(sys.modules, "zstandard", opened)
    assert list(read_documents(str(tmp_path / "a.txt.zst"))) == ["unpacked"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_a_damaged_archive_is_named(name, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(os.urandom(5000))[:3000])
    with pytest.raises(CalibrationError, match=rf"cannot read .*{name}"):
        list(read_documents(str(tmp_path / name)))
    (tmp_path / name).write_bytes(b"none")
    with pytest.raises(CalibrationError, match=rf"cannot read .*{name}"):
        list(read_documents(str(tmp_path / name)))


def test_hidden_files_of_a_folder_are_left_alone(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in (".cache/a.txt", "._b.txt"):
        (tmp_path / name).write_text("hidden")
    (tmp_path / "c.txt").write_text("seen")
    assert list(read_documents(str(tmp_path))) == ["seen"]
    assert list(read_documents(str(tmp_path / ".cache"))) == ["hidden"]


def test_rows_of_parquet_are_counted_over_all_batches(tmp_path):
    messages = [[{"role": "user", "content": "text"}]] * 600 + [[{"role": "user", "content": None}]]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "c.parquet")
    with pytest.raises(CalibrationError, match=r"c\.parquet, row 601, message 1"):
        list(read_documents(str(tmp_path / "c.parquet")))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "noname"])
def test_only_regular_files_are_read(name, tmp_path):
    os.mkfifo(tmp_path / name)  # reading it would wait for ever
    with pytest.raises(CalibrationError, match=f"{name} is no regular file"):
        list(read_documents(str(tmp_path / name)))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CalibrationError, match=f"{name} is no regular file"):
        list(read_documents(str(tmp_path / name)))
    if name != "noname":
        with pytest.raises(CalibrationError, match=f"{name} is no regular file"):
            list(read_documents(str(tmp_path)))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(CalibrationError, match=f"{name} is a link that leads nowhere"):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize(("name", "message"), [("a.txt", "a line of .*a.txt has more"), ("a.jsonl", "line 2 has more")])
def test_a_line_without_end_is_refused(name, message, tmp_path):
    (tmp_path / name).write_text('{"text": "short"}\n' + "x" * 2000)
    refused = pytest.raises(CalibrationError, match=rf"{message} than 1,000 characters; cut it")
    with other_thresholds(longest_line=1000, segment=100), refused:
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_list_without_end_is_refused(name, tmp_path):
    content = json.dumps([{"text": "the river"}] * 100).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with other_thresholds(longest_list=1000), pytest.raises(CalibrationError, match=r"1,000 characters, and a list"):
        list(read_documents(str(tmp_path / name)))
    assert len(list(read_documents(str(tmp_path / name)))) == 100


def test_of_a_long_row_only_the_start_is_tokenised(tokenizer):
    text = " ".join(SENTENCES) * 200
    read = []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            read.append(len(text))
            return tokenizer(text, **options)

    windows = cut_windows(Counting(), [text * 20], 3, 16, "text")
    assert windows.flatten().tolist() == tokenizer(text)["input_ids"][:48]
    assert max(read) < 4000
    blank = "the" + " " * 9000 + "river runs"  # few tokens for its length: all of it is read in the end
    whole = [*tokenizer(blank)["input_ids"], tokenizer.eos_token_id]
    assert cut_windows(Counting(), [blank], 1, len(whole), "text").flatten().tolist() == whole


REFUSING = "{% if messages[0].content == 'no' %}{{ raise_exception('roles must alternate') }}{% endif %}" + TEMPLATE


def test_a_chat_that_the_template_refuses_is_counted_and_named(tokenizer, tmp_path):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = REFUSING
    good, bad = {"messages": CHAT}, {"messages": [{"role": "user", "content": "no"}]}
    file = jsonl(tmp_path / "a.jsonl", [good, bad, good])
    length = 2 * len(tokenizer(chatty.apply_chat_template(CHAT, tokenize=False))["input_ids"])
    with pytest.warns(
        UserWarning, match=r"1 of 3 conversations of 'text' are left out.*line 2: .*roles must alternate"
    ):
        windows = cut_windows(chatty, read_documents(str(file)), 1, length, "text")
    assert torch.equal(windows, cut_windows(chatty, [CHAT, CHAT], 1, length, "text"))
    jsonl(file, [good, bad, bad])
    with pytest.raises(CalibrationError, match=r"refuses 2 of 3 conversations.*a\.jsonl, line [23]: .*roles must"):
        sample_windows(chatty, str(file), 2, 200)


ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


def test_a_template_that_does_not_end_is_stopped(tokenizer):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = ENDLESS
    rows = [documents.Conversation(CHAT, f"chats.jsonl, line {number}") for number in range(1, 100)]
    message = r"chats\.jsonl, line 1: .* chat template has not ended after 0\.3 seconds"
    with other_thresholds(template_seconds=0.3), pytest.raises(UsageError, match=message):
        cut_windows(chatty, rows, 2, 8, "chats.jsonl")  # at the first, and not for every row
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def forever():
    with time_limit(0.05):
        while True:
            pass


def test_a_time_limit_leaves_other_threads_and_what_ends_in_time_alone():
    with time_limit(5.0):
        pass
    results = []

    def work():
        with time_limit(0.001):
            time.sleep(0.05)
            results.append("ended")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == ["ended"]
    with pytest.raises(TimeoutError):
        forever()
