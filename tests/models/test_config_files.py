"""Damaged files beside the weights, and settings that no model has: one line that names file, value and rule."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import ModelError, NumericalError, SlimGPTError, UsageError, one_line
from slimgpt.models.lookup import check_ids
from slimgpt.models.source import locate
from slimgpt.planning.plan_file import read_plan
from slimgpt.runtime.devices import as_device
from tests.models.families import VOCABULARY, windows

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(dense_folder, tmp_path):
    """A tiny Llama to be damaged."""
    return shutil.copytree(dense_folder, tmp_path / "model")


def change(file, **values):
    """Change settings of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refuse(path, *messages):
    """Check that `load` and the commands that read no weights refuse a folder with these words."""
    with pytest.raises(SlimGPTError) as caught:
        slimgpt.load(str(path))
    texts = [str(caught.value)]
    for command in (["inspect", path], ["plan", path, "--ratio", 0.3]):
        result = run(*command)
        assert result.exit_code == 2, result.output
        texts.append(" ".join(result.output.split()))
    for text in texts:
        for message in messages:
            assert message in text, text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1 to 2,000"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000"),
        ({"hidden_size": -48}, "hidden_size is -48"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"intermediate_size": 1.5}, "intermediate_size is 1.5"),
        ({"pad_token_id": VOCABULARY}, f"pad_token_id is {VOCABULARY}, and the vocabulary has {VOCABULARY} tokens"),
        (
            {"torch_dtype": "auto"},
            "torch_dtype is 'auto'; it must be one of float32, float16, bfloat16",
        ),
        ({"dtype": "auto"}, "dtype is 'auto'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": 16}, "dtype is 16"),
        ({"model_type": ["llama"]}, "does not name a model_type"),
        ({"note": "\ud800"}, "'note' has half of a surrogate pair"),
    ],
)
def test_a_config_that_no_model_has_is_refused(values, message, folder):
    change(folder / "config.json", **values)
    refuse(folder, message)


def test_heads_that_do_not_divide_among_kv_heads_are_refused(folder):
    heads = slimgpt.load(str(folder))[0].config.num_attention_heads
    change(folder / "config.json", num_key_value_heads=heads - 1)
    for command in (["inspect", folder], ["plan", folder, "--ratio", 0.3]):
        result = run(*command)
        assert result.exit_code == 2
        assert f"num_key_value_heads {heads - 1}" in " ".join(result.output.split())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no settings but a list"),
        (b'{"model_type": "lla', "cannot be read"),
        (b'{"model_type": "\xff"}', "cannot be read"),
        (b'{"a": ' * 400 + b"1" + b"}" * 400, "nested more than 64 levels deep"),
        (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "cannot be read"),
    ],
)
def test_damaged_json_is_refused(name, content, message, folder):
    (folder / name).write_bytes(content)
    refuse(folder, name, message)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "b"}}',
        json.dumps({"metadata": {}, "weight_map": {"a": "x" * 300}}),
        json.dumps({"metadata": {}, "weight_map": {"a": "x/" * 3000}}),
    ],
)
def test_an_index_that_names_no_files_is_refused(content, folder):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(content)
    refuse(folder, INDEX)


@pytest.mark.parametrize("value", ["long", {"a": 1}])
def test_a_length_of_a_tokenizer_that_is_no_number_is_refused(value, folder, text_file):
    change(folder / "tokenizer_config.json", model_max_length=value)
    result = run("evaluate", folder, "--text", text_file, "--window", 16, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert "model_max_length is" in " ".join(result.output.split())


def test_missing_shards_are_refused(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    refuse(folder, "which its index names")


def test_fp8_weights_without_scales_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    refuse(folder, f"holds {name} in F8_E4M3")


def test_an_adapter_that_names_itself_is_refused(folder):
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    refuse(folder, "which is an adapter itself")


@pytest.mark.parametrize("kind", ["pipe", "endless link"])
@pytest.mark.parametrize("name", ["model.safetensors", "plan.toml"])
def test_only_regular_files_are_read(kind, name, folder):
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to(folder / name)
    if name == "plan.toml":
        with pytest.raises(UsageError, match="no regular file"):
            read_plan(folder / name, None)
    else:
        refuse(folder, name)


NO_FILES = {
    "pipe": os.mkfifo,
    "endless link": lambda file: file.symlink_to(file),
    "device": lambda file: file.symlink_to("/dev/zero"),
    "folder": lambda file: file.mkdir(),
}


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("slimgpt.json", "adapter_config.json", "adapter_model.safetensors"),
    ],
)
def test_what_is_no_file_is_not_taken_for_one_that_is_not_there(name, folder):
    for kind in ("pipe", "endless link", "device"):
        (folder / name).unlink(missing_ok=True)
        NO_FILES[kind](folder / name)
        with pytest.raises(ModelError, match=f"{name} is no regular file, or a link that leads nowhere"):
            locate(str(folder))


@pytest.mark.parametrize("kind", NO_FILES)
def test_shards_and_files_of_an_adapter_are_regular_files(kind, folder, tmp_path):
    save_torch_state_dict(load_file(folder / "model.safetensors"), folder, max_shard_size="60KB")
    shard = sorted(folder.glob("model-*"))[1]
    shard.unlink()
    NO_FILES[kind](shard)
    refuse(folder, f"{shard.name} is no regular file")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    NO_FILES[kind](adapter / "adapter_model.safetensors")
    refuse(adapter, "adapter_model.safetensors is no regular file")


@pytest.mark.parametrize("name", ["meta", "cpu:3"])
def test_devices_that_are_none_are_refused(name):
    with pytest.raises(UsageError, match=f"device '{name}' cannot be used here"):
        as_device(name)
    assert as_device("cpu:0").type == "cpu"


@pytest.mark.parametrize(("option", "value"), [("--batch-size", 0), ("--max-tokens", -5)])
def test_evaluate_refuses_counts_below_one(option, value, folder, text_file):
    result = run("evaluate", folder, "--text", text_file, option, value)
    assert result.exit_code == 2
    assert f"is {value}; it must be at least 1" in " ".join(result.output.split())


def test_evaluate_of_a_model_that_gives_nan_is_an_error(folder, text_file):
    model, tokenizer = slimgpt.load(str(folder))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="gives NaN"):
        slimgpt.evaluate(model, tokenizer, str(text_file), window=16, max_tokens=64)
    model.save_pretrained(folder)
    result = run("evaluate", folder, "--text", text_file, "--window", 16, "--max-tokens", 64, "--device", "cpu")
    assert result.exit_code == 2, result.output


def test_token_ids_without_a_row_in_the_embedding_are_refused(folder, tmp_path):
    check_ids(torch.tensor([0, VOCABULARY - 1]), VOCABULARY, "a text")
    with pytest.raises(UsageError, match="token id -1"):
        check_ids(torch.tensor([-1]), VOCABULARY, "a text")
    _, grown = slimgpt.load(str(folder))
    grown.add_tokens([f"added{number}" for number in range(VOCABULARY)])
    grown.save_pretrained(folder)
    text = tmp_path / "added.txt"
    last = f"added{VOCABULARY - 1}"
    text.write_text(f"The river {last} runs past the old mill and on to the sea.\n" * 200)
    device = ("--device", "cpu")
    small = ("--num-samples", 8, "--seq-len", 24, *device)
    commands = [
        ("prune", folder, tmp_path / "out", "--ratio", 0.3, "--calibration", text, *small),
        ("evaluate", folder, "--text", text, "--window", 16, *device),
        ("recover", folder, tmp_path / "out", "--data", text, "--max-length", 16, "--max-steps", 1, *device),
        ("generate", folder, last, "--max-new-tokens", 2, *device),
    ]
    for command in commands:
        result = run(*command)
        message = " ".join(result.output.split())
        assert result.exit_code == 2, message
        assert "is outside the model's vocabulary of" in message, message
        assert "resize_token_embeddings" in message
    assert not (tmp_path / "out").exists()


def test_sampling_settings_of_an_old_config_are_kept(folder, text_file, tmp_path):
    old = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.1}
    (folder / "generation_config.json").unlink()
    change(folder / "config.json", **old)
    plain = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert {name: getattr(plain, name) for name in old} == old
    small = {"calibration": str(text_file), "num_samples": 8, "seq_len": 24, "device": "cpu"}
    slimgpt.prune_folder(str(folder), tmp_path / "streamed", 0.3, **small)
    model, tokenizer = slimgpt.load(str(folder))
    report = slimgpt.prune(model, tokenizer, 0.3, **small)
    slimgpt.save(model, tokenizer, report, tmp_path / "saved")
    slimgpt.export(folder, tmp_path / "exported", "hf-uniform", check=False)
    for name in ("streamed", "saved", "exported"):
        settings = slimgpt.load(str(tmp_path / name))[0].generation_config
        assert {key: getattr(settings, key) for key in old} == old, name


def test_a_sentencepiece_model_alone_says_what_to_install(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"no model")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "slimgpt.models.loading.find_spec",
        lambda name: None if name in ("sentencepiece", "google.protobuf") else find_spec(name),
    )
    with pytest.raises(ModelError, match=r"no tokenizer\.json; .*pip install sentencepiece protobuf"):
        slimgpt.load(str(folder))


def test_the_whole_reason_of_another_librarys_error_is_said():
    assert one_line(ValueError("Validation error for field 'n':\n    TypeError: it is text\n  give a number")) == (
        "Validation error for field 'n': TypeError: it is text give a number"
    )
    assert one_line(ValueError("one of: \n(1) this, \n(2) that\n")) == "one of: (1) this, (2) that"
    assert one_line(ValueError("\n \n")) == "ValueError"
    assert one_line(ValueError("first\n" + "x" * 1000)) == "first ..."


def test_a_damaged_report_is_refused(folder):
    (folder / "slimgpt.json").write_text('{"layers": 3}')
    with pytest.raises(ModelError, match=r"slimgpt\.json is damaged"):
        slimgpt.inspect(str(folder))


@pytest.mark.parametrize("key", ["text_config", "decoder"])
@pytest.mark.parametrize("part", [{"": None}, {}, {"hidden_size": 48}, [1], "llama", 3])
def test_a_part_that_the_class_does_not_know_is_refused_by_its_key(key, part, dense_folder, tmp_path):
    """Found by the fuzz run of config.json: transformers hands such a part on as the language model's config."""
    folder = shutil.copytree(dense_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: part}))
    for read in (slimgpt.inspect, slimgpt.load):
        with pytest.raises(ModelError, match=rf"{key} in the config of 'model' is no config of a language model"):
            read(str(folder))


def test_a_report_of_another_number_of_layers_is_refused(dense_folder, tmp_path):
    """Found by the fuzz run: without ``num_hidden_layers`` a config has its class's default."""
    model, tokenizer = slimgpt.load(str(dense_folder))
    report = slimgpt.prune(model, tokenizer, 0.3, windows(8, 24, seed=1), device="cpu", distill="off", evaluate=False)
    slimgpt.save(model, tokenizer, report, tmp_path / "slim")
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    del config["num_hidden_layers"]
    (tmp_path / "slim" / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "slim")])
    assert result.exit_code == 2
    assert "is of a model of 4 layers, and by config.json there are 32" in " ".join(result.stderr.split())
