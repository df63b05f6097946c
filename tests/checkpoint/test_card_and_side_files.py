"""What lies beside the weights: side files go along, and names on the card are text."""

from __future__ import annotations

import pytest

import slimgpt
from slimgpt.checkpoint import card
from slimgpt.errors import ExportError
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
    for folder in (slim, tmp_path / "padded"):
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
    name = card._public_name(base)
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
