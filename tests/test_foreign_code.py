"""Code that lies in a model's folder runs only where the user has allowed it, whichever command is given."""

import json

import pytest
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.evaluation import peak_memory
from slimgpt.models.source import locate

MARK = "import pathlib\npathlib.Path({!r}).write_text('it ran')\n"


@pytest.fixture
def planted(dense_folder, text_file, tmp_path):
    """A slim folder with a marker in every place where Python code can lie; and the marker's file."""
    folder, mark = tmp_path / "slim", tmp_path / "mark"
    slimgpt.prune_folder(
        str(dense_folder), folder, 0.3, str(text_file), num_samples=8, seq_len=16, device="cpu", distill="off"
    )
    code = MARK.format(str(mark))
    modeling = folder / "modeling_slim.py"
    modeling.write_text(modeling.read_text() + code)
    (folder / "configuration_evil.py").write_text(code + "from transformers import LlamaConfig as EvilConfig\n")
    (folder / "tokenization_evil.py").write_text(
        code + "from transformers import PreTrainedTokenizerFast as EvilTokenizer\n"
    )
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(*_, **__):\n    return None\n")
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_slim.")
    config["auto_map"]["AutoConfig"] = "configuration_evil.EvilConfig"
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_evil.EvilTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(
        "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}{{ messages }}"
    )
    return folder, mark


def test_no_command_runs_it(planted, dense_folder, text_file, tmp_path):
    folder, mark = planted
    rows = tmp_path / "chats.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 8)
    short = ["--device", "cpu"]
    few = ["--num-samples", "4", "--seq-len", "16", *short]
    commands = [
        ["inspect", folder],
        ["plan", folder, "--ratio", "0.2"],
        ["evaluate", folder, "--text", text_file, "--window", "16", "--max-tokens", "64", *short],
        # Peak memory is measured by the test below.
        ["speed", folder, "--prompt", "8", "--new-tokens", "2", "--rounds", "1", "--no-memory", *short],
        ["compare", dense_folder, folder, "--out", tmp_path / "c", "--text", text_file, "--window", "16",
         "--max-tokens", "64", "--no-speed", *short],
        ["verify", folder, "--against", folder],
        ["export", folder, tmp_path / "padded", "--to", "padded"],
        ["export", folder, tmp_path / "slim.gguf", "--to", "gguf"],
        ["prune", folder, tmp_path / "slimmer", "--ratio", "0.2", "--calibration", text_file, *few],
        ["prune", folder, tmp_path / "chatty", "--ratio", "0.2", "--calibration", rows, *few],
        ["recover", folder, tmp_path / "recovered", "--data", rows, "--max-steps", "1", "--held-out", "2", *short],
    ]  # fmt: skip
    ended = {}
    for words in commands:
        done = CliRunner().invoke(app, [str(word) for word in words])
        ended[words[0]] = done.exit_code
        assert not mark.exists(), words
        assert done.exit_code in (0, 1, 2), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    assert [name for name, code in ended.items() if code] == ["prune", "recover"]  # on chats, by the template


def test_a_fresh_process_measures_the_model_with_the_class_of_this_version(planted):
    folder, mark = planted
    assert peak_memory(locate(str(folder)), prompt=8, new_tokens=2) > 50e6
    assert not mark.exists()
    peak_memory(locate(str(folder)), prompt=8, new_tokens=2, trust_remote_code=True)
    assert mark.exists()  # the plant works: with the flag it does run
