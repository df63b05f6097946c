"""`generate` and `chat` beside a loop over the model's own most likely tokens."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.runtime.thresholds import other_thresholds
from tests.calibration.test_calibration import ENDLESS
from tests.models.families import tiny_model

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def run(*words, **options):
    return CliRunner().invoke(app, [str(word) for word in words], **options)


def expected(folder, text, count):
    """The most likely tokens after a text, one by one and without a cache."""
    model, tokenizer = slimgpt.load(str(folder))
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture
def chat_folder(dense_folder, tokenizer, tmp_path):
    """The tiny model with a chat template."""
    folder = tmp_path / "chat"
    slimgpt.load(str(dense_folder))[0].save_pretrained(folder)
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = TEMPLATE
    with_template.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_generate_goes_on_from_the_prompt(options, dense_folder):
    result = run("generate", dense_folder, "The river runs", "--max-new-tokens", 8, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == expected(dense_folder, "The river runs", 8).strip()


def test_generate_reads_standard_input(dense_folder):
    result = run("generate", dense_folder, "-", "--max-new-tokens", 8, input="The river runs")
    assert result.stdout.strip() == expected(dense_folder, "The river runs", 8).strip()
    assert run("generate", dense_folder, "-", input=" \n").exit_code == 2


def test_sampling_is_seeded(dense_folder):
    words = ["generate", dense_folder, "The mill", "--temperature", 1.5, "--max-new-tokens", 12, "--seed"]
    first, again, other = (run(*words, seed).stdout for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("seed", [2**63, 2**64])
def test_a_seed_that_generators_do_not_take_is_refused(seed, dense_folder, chat_folder):
    for words in (["generate", dense_folder, "The mill"], ["chat", chat_folder]):
        result = run(*words, "--temperature", 1, "--seed", seed)
        assert result.exit_code == 2
        assert f"seed is {seed}; it must be below 2**63" in " ".join(result.output.split())


def test_the_largest_seed_is_enough_for_all_turns(chat_folder):
    words = ["chat", chat_folder, "--temperature", 1, "--max-new-tokens", 2, "--seed", 2**63 - 1]
    assert run(*words, input="a\nb\nc\n").exit_code == 0


def test_the_template_is_used_unless_the_prompt_is_raw(chat_folder):
    asked = run("generate", chat_folder, "The mill", "--max-new-tokens", 6).stdout
    assert asked.strip() == expected(chat_folder, "user: The mill\n", 6).strip()
    raw = run("generate", chat_folder, "The mill", "--raw", "--max-new-tokens", 6).stdout
    assert raw.strip() == expected(chat_folder, "The mill", 6).strip()


def test_a_chat_remembers_what_was_said(chat_folder):
    result = run(
        "chat", chat_folder, "--max-new-tokens", 5, "--system", "Be short.", input="The river\nThe sea\n\nThe mill\n"
    )
    assert result.exit_code == 0, result.output
    first = expected(chat_folder, "system: Be short.\nuser: The river\n", 5)
    history = f"system: Be short.\nuser: The river\nassistant: {first.strip()}\nuser: The sea\n"
    second = expected(chat_folder, history, 5)
    assert result.stdout.split() == f"{first}\n{second}".split()


def test_a_template_that_refuses_or_does_not_end_is_one_line(chat_folder):
    template = chat_folder / "chat_template.jinja"
    template.write_text("{{ raise_exception('no system prompt') }}")
    result = run("generate", chat_folder, "The mill")
    assert result.exit_code == 2
    assert "chat template refuses the conversation: no system prompt" in " ".join(result.output.split())
    template.write_text(ENDLESS)
    with other_thresholds(template_seconds=0.2):
        result = run("generate", chat_folder, "The mill")
    assert result.exit_code == 2
    assert "the prompt: the tokenizer's chat template has not ended after 0.2 seconds" in " ".join(
        result.output.split()
    )


def test_a_template_inside_a_gguf_file_that_does_not_end_is_one_line(chat_folder, tmp_path):
    (chat_folder / "chat_template.jinja").write_text(ENDLESS)
    tiny_model("llama", mlp_bias=False, attention_bias=False).save_pretrained(chat_folder)
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    slimgpt.export(chat_folder, file, "gguf", quantize="F32", check=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "The mill"}]}) + "\n")
    short = ["--device", "cpu"]
    for words in (
        ["generate", file, "The mill"],
        ["prune", file, out, "--ratio", 0.2, "--calibration", rows, "--num-samples", 2, "--seq-len", 8, *short],
        ["recover", file, out, "--data", rows, "--max-length", 24, "--max-steps", 1, *short],
    ):
        with other_thresholds(template_seconds=0.2):
            result = run(*words)
        assert result.exit_code == 2, result.output
        assert "chat template has not ended after 0.2 seconds" in " ".join(result.output.split())
        assert not out.exists()


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["generate", "FOLDER", "a\udcffb"], None, r"the prompt 'a\udcffb' is no text in UTF-8"),
        (["chat", "FOLDER", "--system", "\udcff"], "hello\n", r"the prompt '\udcff' is no text in UTF-8"),
        (["generate", "FOLDER", "-"], b"\xff the mill", "standard input is no text in UTF-8: invalid start byte"),
        (["chat", "FOLDER"], b"\xff\n", "standard input is no text in UTF-8: invalid start byte at byte 1"),
    ],
)
def test_bytes_that_are_no_text_are_refused(words, given, message, chat_folder):
    result = run(*[chat_folder if word == "FOLDER" else word for word in words], "--max-new-tokens", 2, input=given)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_an_answer_of_any_length_ends_with_the_context(dense_folder):
    for temperature in (0, 1):
        result = run("generate", dense_folder, "The mill", "--max-new-tokens", 10**9, "--temperature", temperature)
        assert result.exit_code == 0, result.output


def test_a_chat_needs_a_template(dense_folder):
    result = run("chat", dense_folder, input="Hello\n")
    assert result.exit_code == 2
    assert "has no chat template; use slimgpt generate" in " ".join(result.stderr.split())
