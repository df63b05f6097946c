"""Documents to examples: what is learned, what is cut, what is packed."""

from __future__ import annotations

import json

import pytest
import torch

from slimgpt.calibration import Instruction, read_documents, sample_windows
from slimgpt.errors import CalibrationError, UsageError
from slimgpt.recovery.dataset import IGNORED, collate, collect, encode, make_examples

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "the sea"},
    {"role": "user", "content": "the mill"},
    {"role": "assistant", "content": "the layers"},
]


def learned(tokenizer, ids, labels):
    """The text of the tokens that are learned."""
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels))
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_plain_text_is_packed_into_full_windows_of_all_its_tokens(tokenizer):
    documents = ["The river runs past the old mill.", "A small model.", "She counted the heads and the layers."]
    examples = list(make_examples(tokenizer, documents, 8))
    joined = [t for d in documents for t in [*tokenizer(d)["input_ids"], tokenizer.eos_token_id]]
    assert torch.cat([e.ids for e in examples]).tolist() == joined[: len(joined) // 8 * 8]
    assert all(e.predicted == 7 for e in examples)


def test_of_an_instruction_only_the_answer_is_learned(tokenizer):
    document = Instruction("the heads ", "the layers")
    ids, labels = encode(tokenizer, document)
    assert tokenizer.decode(ids) == "the heads the layers"
    assert learned(tokenizer, ids, labels) == "the layers"
    (example,) = make_examples(tokenizer, [document], 64)
    assert example.ids[-1] == example.labels[-1] == tokenizer.eos_token_id


def test_alpaca_rows_become_its_prompt_and_the_answer(tmp_path):
    file = tmp_path / "rows.json"
    rows = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Go.", "input": "", "output": "No."},
    ]
    file.write_text(json.dumps(rows))
    first, second = read_documents(str(file))
    assert "### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n" in first.prompt
    assert "### Input" not in second.prompt
    assert (first.response, second.response) == ("2", "No.")


def test_alpaca_rows_also_calibrate(tmp_path, tokenizer):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "Add.", "output": "The river runs."}] * 4))
    assert sample_windows(tokenizer, str(file), 2, 16).shape == (2, 16)


def test_a_json_file_that_is_no_list_says_so(tmp_path):
    (tmp_path / "rows.json").write_text("{}")
    with pytest.raises(CalibrationError, match="no list of rows"):
        list(read_documents(str(tmp_path / "rows.json")))


def test_of_a_chat_the_assistants_turns_are_learned(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    ids, labels = encode(tokenizer, CHAT)
    assert learned(tokenizer, ids, labels) == "the sea<end>the layers<end>"


def test_a_template_that_rewrites_earlier_turns_is_learned_as_a_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}" + TEMPLATE)
    ids, labels = encode(tokenizer, CHAT)
    assert ids == labels


def test_long_examples_are_cut_and_examples_without_an_answer_dropped(tokenizer):
    long_prompt = Instruction("the river runs past the old mill and on to the sea " * 4, "the sea")
    assert list(make_examples(tokenizer, [long_prompt], 16)) == []
    (example,) = make_examples(tokenizer, [Instruction("the ", "river runs past the old mill and " * 9)], 16)
    assert len(example.ids) == 16


def test_packing_keeps_which_tokens_are_learned(tokenizer):
    documents = [Instruction("the river ", "the sea"), Instruction("the mill ", "the layers")] * 4
    examples = list(make_examples(tokenizer, documents, 16, pack=True))
    ids = [t for e in examples for t in e.ids.tolist()]
    labels = [t for e in examples for t in e.labels.tolist()]
    assert all(len(e.ids) == 16 for e in examples)
    assert learned(tokenizer, ids, labels).startswith("the sea<end>the layers<end>")


def test_padding_is_masked_and_not_learned(tokenizer):
    examples = [*make_examples(tokenizer, [Instruction("the ", "sea"), Instruction("the ", "river runs past")], 32)]
    batch = collate(examples, 0)
    assert batch["attention_mask"].sum(1).tolist() == [len(e.ids) for e in examples]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_sources_give_equal_shares_and_the_seed_decides(tokenizer, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the heads " * 500)
    sources = [str(text_file), str(other)]
    data = collect(tokenizer, sources, 24, held_out=4, needed=20)
    from_other = sum("heads the heads the" in tokenizer.decode(e.ids) for e in data.training)
    assert (len(data.training), len(data.held_out), from_other) == (20, 4, 10)
    assert collect(tokenizer, sources, 24, 4, 20).digest() == data.digest()
    assert collect(tokenizer, sources, 24, 4, 20, seed=1).digest() != data.digest()
    assert tuple(data.held_out[0].ids.tolist()) not in {tuple(e.ids.tolist()) for e in data.training}


def test_shares_divide_the_examples(tokenizer, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the heads " * 500)
    data = collect(tokenizer, [str(text_file), str(other)], 24, held_out=0, needed=20, shares=(4, 1))
    assert sum("heads the heads the" in tokenizer.decode(e.ids) for e in data.training) == 4
    with pytest.raises(UsageError, match="one for each source"):
        collect(tokenizer, [str(text_file)], 24, 0, shares=(4, 1))


def test_too_little_text_says_so(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("the")
    with pytest.raises(CalibrationError, match="no example of 24 tokens"):
        collect(tokenizer, [str(tmp_path / "short.txt")], 24, 4)


def test_rows_without_room_for_their_answer_are_counted(tokenizer, tmp_path):
    file = tmp_path / "rows.json"
    long = {"instruction": "Go on. " * 60, "output": "No."}
    rows = [{"instruction": "Go.", "output": "No."}] * 3 + [long] * 2
    file.write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match=r"2 rows of '.*' have no answer within 200 tokens.*a larger --max-length"):
        data = collect(tokenizer, [str(file)], 200, held_out=0)
    assert (len(data.training), data.without_answer) == (3, 2)
    with pytest.raises(CalibrationError, match=r"5 rows of '.*' have no answer within 20 tokens.*raise --max-length"):
        collect(tokenizer, [str(file)], 20, held_out=0)


def test_a_chat_that_the_template_refuses_is_left_out(tokenizer, tmp_path, monkeypatch):
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('bad roles') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    file = tmp_path / "rows.json"
    rows = [{"messages": CHAT}] * 2 + [{"messages": [{"role": "user", "content": "no"}]}]
    file.write_text(json.dumps(rows))
    for pack in (False, True):
        with pytest.warns(UserWarning, match=r"1 of 3 conversations .*row 3: .*bad roles"):
            assert collect(tokenizer, [str(file)], 16 if pack else 64, 0, pack=pack).training
    file.write_text(json.dumps(rows[1:] + rows[2:]))
    with pytest.raises(CalibrationError, match="refuses 2 of 3 conversations"):
        collect(tokenizer, [str(file)], 64, 0)


def test_a_template_of_whole_conversations_only_is_learned_as_a_whole(tokenizer, monkeypatch):
    picky = "{% if messages[-1].content != 'the layers' %}{{ raise_exception('unfinished') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", picky)
    ids, labels = encode(tokenizer, CHAT)
    assert ids == labels


def test_a_long_text_is_tokenised_in_pieces(tokenizer):
    text = "The river runs past the old mill and on to the sea." + " The river runs." * 400
    whole = [e.ids.tolist() for e in make_examples(tokenizer, [text], 16)]
    assert [e.ids.tolist() for e in make_examples(tokenizer, [text], 16, chunk_chars=500)] == whole


def test_of_a_long_answer_only_the_start_is_tokenised(tokenizer):
    row = Instruction("The river ", "runs past the old mill " * 5000)
    ids, labels = encode(tokenizer, row, 16)
    assert 16 <= len(ids) < 1000
    whole, learned_whole = encode(tokenizer, row)
    assert (ids[:16], labels[:16]) == (whole[:16], learned_whole[:16])
