"""Models in an engine with a Python of its own. transformers in a fresh process is such an engine and runs by default;
the others where a variable names their Python: SLIMGPT_VLLM_PYTHON, SLIMGPT_MLX_PYTHON, SLIMGPT_LLAMA_CPP_PYTHON,
SLIMGPT_OPENVINO_PYTHON, SLIMGPT_ONNXRUNTIME_PYTHON.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import ExportError, NumericalError, UsageError
from slimgpt.exporting import verify_in_engine
from slimgpt.exporting.decoder_graph import DecoderGraph
from slimgpt.exporting.engine_verification import Reference
from slimgpt.exporting.verification import PROMPTS
from tests.conftest import SENTENCES
from tests.models.families import tiny_model, windows

WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # vLLM's kernels for the CPU take no smaller heads than 32
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 70000.0},
}
"""A model that every engine takes; its rotary base is nobody's default."""

FFN = """head_unit = "kv"
layers = [
  {num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 512},
  {num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 768},
  {num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = 256},
]
"""


@pytest.fixture(scope="module")
def forms(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """Slim folders of one model: widths by layer, equal ones, FFN only; and what is exported from them."""
    root = tmp_path_factory.mktemp("forms")
    (root / "plan.toml").write_text(FFN)
    options = {
        "layers": {"ratio": 0.3},
        "uniform": {"ratio": 0.3, "uniform": True, "round_to": 64},
        "ffn": {"plan": str(root / "plan.toml")},
    }
    for name, settings in options.items():
        model = tiny_model("llama", **WIDE)
        with torch.no_grad():  # so that layers matter beside the embedding
            for parameter in model.model.layers.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        report = slimgpt.prune(model, None, calibration=windows(), device="cpu", distill="off", **settings)
        slimgpt.save(model, tokenizer, report, root / name)
    assert not slimgpt.inspect(str(root / "layers")).uniform
    slimgpt.export(root / "layers", root / "padded", "padded", check=False)
    slimgpt.export(root / "layers", root / "layers.gguf", "gguf", quantize="F32", check=False)
    slimgpt.export(root / "ffn", root / "nemotron", "nemotron-nas")
    for to in ("openvino", "onnx"):
        if importlib.util.find_spec({"onnx": "onnxscript"}.get(to, to)) is not None:
            slimgpt.export(root / "layers", root / to, to, check=False)
    return {path.stem if path.is_dir() else path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def reference(forms) -> Reference:
    return Reference(str(forms["layers"]), PROMPTS, None, 64, 16)


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


def answer_of(reference: Reference) -> dict:
    """An engine that computes exactly what the reference does."""
    return {
        "versions": {"engine": "1.0"},
        "text_ids": [sequence["ids"] for sequence in reference.sequences[: len(PROMPTS)]],
        "sequences": [
            {"logprobs": list(logprobs), "continuation": [int(row.argmax()) for row in steps]}
            for logprobs, steps in zip(reference.logprobs, reference.steps)
        ],
    }


def test_transformers_in_a_fresh_process_computes_the_slim_folder(forms, tmp_path):
    code, output = command(
        *("verify", forms["layers"], "--engine", "transformers", "--trust-remote-code", "--json", tmp_path / "v.json")
    )
    assert code == 0, output
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["largest"] < 1e-5
    assert result["perplexity"] == pytest.approx(result["reference"], rel=1e-5)
    assert [prompt["same"] for prompt in result["prompts"]] == [True] * 5
    assert [prompt["same_ids"] for prompt in result["prompts"]] == [True] * 5
    assert {prompt["continuation"] for prompt in result["prompts"]} == {p["reference"] for p in result["prompts"]}
    assert "transformers" in result["versions"]


def test_log_probabilities_are_those_of_plain_transformers(forms, reference):
    model = AutoModelForCausalLM.from_pretrained(forms["layers"], trust_remote_code=True)
    for index in (0, len(PROMPTS)):
        ids = torch.tensor([reference.sequences[index]["ids"]])
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        assert -sum(reference.logprobs[index]) / len(reference.logprobs[index]) == pytest.approx(loss.item(), rel=1e-5)
    compared = reference.compare(answer_of(reference), 1e-3, 1e-3)
    assert compared.problem() is None
    assert compared.tokens == sum(len(sequence["ids"]) - 1 for sequence in reference.sequences)
    assert (compared.largest, compared.difference, compared.continuations) == (0.0, 0.0, (5, 0, 5))


@pytest.fixture(scope="module")
def other(forms, tmp_path_factory) -> Path:
    """A folder with one tensor that is not the slim model's."""
    folder = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(forms["padded"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_model_ends_with_1(forms, other):
    code, output = command("verify", other, "--against", forms["layers"], "--engine", "transformers")
    assert code == 1, output
    assert "is another model than the slim folder: a log-probability differs by" in output


def test_a_difference_beyond_the_tolerance_counts_and_one_within_does_not(reference):
    for apart, counts in ((0.9e-3, False), (1.1e-3, True)):
        answer = answer_of(reference)
        answer["sequences"][1]["logprobs"][-1] -= apart
        compared = reference.compare(answer, 1e-3, 1e-3)
        assert compared.largest == pytest.approx(apart)
        assert compared.prompts[1].largest == pytest.approx(apart)
        assert compared.mean == pytest.approx(apart / compared.tokens)
        assert (compared.problem() is not None) == counts


def test_a_continuation_that_parts_is_a_tie_only_where_the_two_tokens_are_as_likely(reference):
    answer = answer_of(reference)
    row = reference.steps[2][3]
    best, second = row.topk(2).indices.tolist()
    answer["sequences"][2]["continuation"][3:] = [second] * 13
    compared = reference.compare(answer, 1e-3, 1e-3)
    parted = compared.prompts[2]
    assert (parted.same, parted.parts_at, parted.tie) == (False, 3, False)
    assert parted.margin == pytest.approx(math.log(row.exp()[best] / row.exp()[second]))
    assert "parts at token 3" in compared.problem()
    near = reference.compare(answer, parted.margin / 2 * 1.01, 1e-3)
    assert near.prompts[2].tie
    assert (near.problem(), near.continuations) == (None, (4, 1, 5))
    far = reference.compare(answer, parted.margin / 2 * 0.99, 1e-3)
    assert far.problem() is not None


def test_too_few_tokens_nan_and_other_token_ids_are_no_agreement(reference):
    answer = answer_of(reference)
    answer["sequences"][0]["logprobs"].pop()
    with pytest.raises(ExportError, match="log-probabilities, not"):
        reference.compare(answer, 1e-3, 1e-3)
    answer = answer_of(reference)
    answer["sequences"][0]["logprobs"][0] = None  # as NaN comes out of JSON
    with pytest.raises(NumericalError, match="NaN"):
        reference.compare(answer, 1e-3, 1e-3)
    answer = answer_of(reference)
    answer["text_ids"][4] = [1, *answer["text_ids"][4]]
    assert "its tokenizer splits" in reference.compare(answer, 1e-3, 1e-3).problem()
    answer = answer_of(reference)
    answer["sequences"][0]["continuation"] = []
    assert reference.compare(answer, 1e-3, 1e-3).prompts[0].margin == math.inf


def test_what_cannot_be_run_is_one_line_and_2(forms, tmp_path):
    layers = forms["layers"]
    (tmp_path / "empty.txt").write_text("\n \n")
    refused = [
        ((layers, "--engine", "transformers"), "holds code that transformers would run"),
        ((layers, "--engine", "sglang"), "engine 'sglang' is unknown; choose transformers, vllm, mlx"),
        ((layers, "--engine", "llama.cpp"), "is no .gguf file"),
        ((layers, "--engine", "openvino"), "export --to openvino"),
        ((forms["nemotron"], "--engine", "mlx"), "--against"),
        ((forms["padded"], "--engine", "transformers", "--python", tmp_path / "python"), "which is no program"),
        ((forms["padded"], "--engine", "transformers", "--python", shutil.which("true")), "failed: exit code 0"),
        ((forms["padded"], "--engine", "transformers", "--prompts", tmp_path / "empty.txt"), "has no prompt"),
        ((forms["padded"], "--engine", "transformers", "--tolerance", "-1"), "tolerance is -1"),
        ((layers, "--python", sys.executable, "--against", layers), "--python is for an engine"),
        ((layers,), "--against"),
    ]
    if importlib.util.find_spec("mlx_lm") is None:
        missing = (forms["uniform"], "--engine", "mlx")
        refused.append(
            (missing, f"mlx is not installed in {sys.executable}; run: {sys.executable} -m pip install mlx-lm")
        )
    for words, expected in refused:
        code, output = command("verify", *words)
        assert code == 2, output
        assert expected in output
        assert output.count("\n") == 1


def test_an_engine_that_fails_leaves_its_output(forms, tmp_path):
    shutil.copytree(forms["padded"], tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "model_type": "no such type"}))
    with pytest.raises(ExportError, match=r"no such type.* its whole output is in ") as failed:
        verify_in_engine(tmp_path / "cut", forms["layers"], engine="transformers")
    log = Path(str(failed.value).partition("output is in ")[2].partition(",")[0])
    assert "Traceback" in log.read_text()
    shutil.rmtree(log.parent)


def test_prompts_of_a_file_and_a_large_tolerance(forms, other, tmp_path):
    (tmp_path / "prompts.txt").write_text("The river\n\nA small model\n")
    words = ("verify", other, "--against", forms["layers"], "--engine", "transformers", "--tolerance", "5")
    code, output = command(*words, "--prompts", tmp_path / "prompts.txt", "--json", tmp_path / "v.json")
    assert code == 0, output
    prompts = json.loads((tmp_path / "v.json").read_text())["prompts"]
    assert [prompt["prompt"] for prompt in prompts] == ["The river", "A small model"]
    with pytest.raises(UsageError, match="no prompt"):
        verify_in_engine(forms["padded"], engine="transformers", prompts=())


def test_a_nemotron_folder_has_a_config_that_transformers_reads(forms):
    config = AutoConfig.from_pretrained(forms["nemotron"], trust_remote_code=True)
    slim = AutoConfig.from_pretrained(forms["ffn"], trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert config.architectures == ["DeciLMForCausalLM"]
    assert config.rope_parameters == slim.rope_parameters
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [2, 2, 2]
    assert [int(2 * block.ffn.ffn_mult * 256 / 3) for block in config.block_configs] == [512, 768, 256]
    assert not any(block.attention.no_op or hasattr(block.ffn, "hidden_act") for block in config.block_configs)
    assert json.loads(config.to_json_string())["block_configs"] == config.block_configs
    values = json.loads((forms["nemotron"] / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 70000.0
    assert values["torch_dtype"] == values["dtype"] == "float32"


# Engines of other environments


def engine_python(engine: str) -> str:
    """The Python of an engine, from its variable; the test is skipped without one."""
    variable = f"SLIMGPT_{engine.upper().replace('.', '_')}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} does not name a Python with {engine}")
    return os.environ[variable]


def test_a_graph_with_a_cache_computes_what_the_model_does(forms):
    model = slimgpt.load(str(forms["layers"]))[0]
    graph = DecoderGraph(model, beams=True)
    ids = windows(3, 12)
    seen = torch.ones_like(ids)
    seen[1, :4] = 0  # padding on the left
    positions = (seen.cumsum(1) - 1).clamp(0)
    with torch.no_grad():
        expected = model(ids, attention_mask=seen, position_ids=positions).logits
        empty = [torch.zeros(3, heads, 0, size) for heads, size in graph.cache_sizes]
        rows = torch.tensor([2, 0, 1])
        first, *cache = graph(ids[rows, :7], seen[rows, :7], positions[rows, :7], torch.arange(3), *empty)
        second = graph(ids[:, 7:], seen, positions[:, 7:], torch.tensor([1, 2, 0]), *cache)[0]
    real = seen.bool()
    logits = torch.cat([first[torch.tensor([1, 2, 0])], second], 1)
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)
    assert [name.split(".")[1] for name in graph.past_names] == [str(i // 2) for i in range(6)]


@pytest.mark.parametrize(("to", "module"), [("openvino", "openvino"), ("onnx", "onnxscript")])
def test_a_converter_that_is_not_installed_is_named(to, module, forms, tmp_path):
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    code, output = command("export", forms["layers"], tmp_path / "out", "--to", to)
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert f"pip install {to}" in output


def agrees(forms: dict[str, Path], form: str, against: str, engine: str) -> None:
    compared = verify_in_engine(
        forms[form],
        forms[against],
        engine=engine,
        python=engine_python(engine),
        prompts=SENTENCES,  # llama.cpp has no unknown token for letters that the toy vocabulary lacks
        trust_remote_code=True,
    )
    assert compared.problem() is None
    assert compared.continuations[0] + compared.continuations[1] == len(SENTENCES)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("form", "against"), [("uniform", "uniform"), ("layers", "layers"), ("nemotron", "ffn"), ("padded", "layers")]
)
def test_vllm(form, against, forms):
    agrees(forms, form, against, "vllm")


@pytest.mark.mlx
@pytest.mark.parametrize(("form", "against"), [("uniform", "uniform"), ("nemotron", "ffn"), ("padded", "layers")])
def test_mlx(form, against, forms):
    agrees(forms, form, against, "mlx")


@pytest.mark.llama_cpp
def test_llama_cpp(forms):
    if "SLIMGPT_LLAMA_CPP_PYTHON" not in os.environ and importlib.util.find_spec("llama_cpp") is not None:
        os.environ["SLIMGPT_LLAMA_CPP_PYTHON"] = sys.executable
    agrees(forms, "layers.gguf", "layers", "llama.cpp")


@pytest.mark.openvino
@pytest.mark.parametrize(("to", "engine"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_graphs(to, engine, forms):
    if to not in forms:
        pytest.skip(f"what exports to {to} is not installed here")
    agrees(forms, to, "layers", engine)
