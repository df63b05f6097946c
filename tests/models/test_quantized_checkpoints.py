"""Quantised checkpoints: what is read of each scheme, against transformers' own de-quantised model and exact values."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, PreTrainedModel

import slimgpt
from slimgpt.errors import ModelError
from slimgpt.models.build import empty_model
from slimgpt.models.loading import load_config, load_model, locate
from slimgpt.models.parameter_counts import describe
from slimgpt.models.quantization import Quantization
from slimgpt.models.streaming import StreamedModel
from slimgpt.models.weight_conversion import ConvertedFiles
from tests.cli.test_command_line import run
from tests.models import quantized_folders as q
from tests.models.quantized_cases import CASES, WIDE, WITH_LIBRARY, Scheme, compressed, dense, exact_model, make
from tests.models.test_multimodal import multimodal

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")


def read(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    source = locate(str(folder))
    return load_model(source, load_config(source), dtype)


def assert_same_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    different = [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]
    assert not different


class Made:
    """A quantised folder, the scheme that it was made by, and the model as it is read; none of them is changed."""

    def __init__(self, case: str, root: Path):
        self.root = root
        self.folder, self.scheme = make(case, root)
        self.loaded = read(self.folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes every case once."""
    cases: dict[str, Made] = {}

    def get(case: str) -> Made:
        if case in WITH_LIBRARY and find_spec("compressed_tensors") is None:
            pytest.skip("pip install compressed-tensors")
        if case not in cases:
            cases[case] = Made(case, tmp_path_factory.mktemp("case"))
        return cases[case]

    return get


@pytest.fixture(params=CASES)
def case(request, made):
    return made(request.param)


def test_every_scheme_is_read_as_the_values_that_it_stands_for(case):
    assert case.loaded.dtype == torch.bfloat16
    assert not hasattr(case.loaded.config, "quantization_config")
    assert_same_weights(case.loaded, exact_model(case.root, case.scheme))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[4] is not None])
def test_every_scheme_is_read_as_transformers_dequantises_it(name, made):
    config: Any = CASES[name][4]
    if config is CompressedTensorsConfig and find_spec("compressed_tensors") is None:
        pytest.skip("pip install compressed-tensors")
    case = made(name)
    theirs = AutoModelForCausalLM.from_pretrained(case.folder, quantization_config=config(dequantize=True))
    assert_same_weights(case.loaded, theirs)


def test_streamed_layers_are_those_of_the_loaded_model(case):
    config = load_config(locate(str(case.folder)))
    streamed = StreamedModel(config, ConvertedFiles(case.folder, empty_model(config)), torch.bfloat16)
    streamed.check_finite()
    for index in range(config.num_hidden_layers):
        theirs = case.loaded.model.layers[index].state_dict()
        for name, tensor in streamed.layer(index).state_dict().items():
            assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


def test_parameters_are_counted_without_scales(case):
    model = AutoModelForCausalLM.from_pretrained(case.root / "dense")
    shape = describe(load_config(locate(str(case.folder))))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    inspected = slimgpt.inspect(str(case.folder))
    assert inspected.parameters == shape.parameters
    assert inspected.quantization is not None
    assert inspected.quantization["read_as"] == "bfloat16"


def test_float32_is_not_rounded_to_bfloat16_before(tmp_path):
    folder, scheme = make("fp8-blocks", tmp_path)
    state = read(folder, "float32").state_dict()
    for name, value in scheme.exact.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-7, atol=0)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    for name, tensor in theirs.state_dict().items():  # which leaves in bfloat16 what is not quantised
        assert torch.equal(state[name], tensor.float()), name


def test_exponents_in_bytes_are_powers_of_two(tmp_path):
    """MXFP8: 32 columns share a scale, a byte with a bias of 127."""
    exact = {}

    def quantise(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        exponents = torch.frexp(tensor.unflatten(1, (-1, 32)).abs().amax(-1)).exponent - 8
        numbers = (tensor / (2.0 ** exponents.repeat_interleave(32, 1))).to(torch.float8_e4m3fn)
        exact[name] = numbers.double() * 2.0 ** exponents.double().repeat_interleave(32, 1)
        return {name: numbers, f"{name}_scale_inv": (exponents + 127).to(torch.uint8)}

    settings = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
    folder = q.rewrite(dense(tmp_path, "qwen3", **WIDE), tmp_path / "mxfp8", quantise, settings)
    state = read(folder).state_dict()
    assert all(torch.equal(state[name].double(), value) for name, value in exact.items())


def test_scales_may_lie_in_another_file(tmp_path):
    folder, scheme = make("fp8-blocks", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + name.endswith('scale_inv')}-of-00002.safetensors" for name in tensors}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same_weights(read(folder), exact_model(tmp_path, scheme))


def test_an_embedding_in_fp8_that_is_the_head_too(tmp_path):
    scheme = Scheme()
    source = dense(tmp_path, "llama", tie_word_embeddings=True)
    folder = q.rewrite(
        source, tmp_path / "fp8", scheme.fp8(q.fp8_per_row, "_scale"), {"quant_method": "fbgemm_fp8"},
        lambda name: "embed" in name,
    )  # fmt: skip
    model = read(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_weights(model, exact_model(tmp_path, scheme))


@pytest.mark.parametrize("model_type", ["llava", "gemma3"])
def test_the_language_model_inside_a_multimodal_one(model_type, tmp_path):
    """As Devstral is published: one scale for each tensor, the vision part as it was."""
    model = multimodal(model_type).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "dense")
    scheme = Scheme()
    folder = q.rewrite(
        tmp_path / "dense", tmp_path / "fp8", scheme.fp8(q.fp8_per_tensor, "_scale_inv", "activation_scale"),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        lambda name: "language_model" in name and bool(q.LINEAR.search(name)),
    )  # fmt: skip
    ours = read(folder)
    assert_same_weights(ours, exact_model(tmp_path, scheme, type(model)))
    config = load_config(locate(str(folder)))
    files = ConvertedFiles(folder, empty_model(config))
    for name, tensor in ours.state_dict().items():
        assert name not in files or torch.equal(files[name], tensor), name


@needs_bitsandbytes
@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ],
    ids=["int8", "nf4-double", "fp4"],
)
def test_bitsandbytes_is_read_as_it_dequantises_itself(settings, tmp_path):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        dense(tmp_path, "qwen3", **WIDE), quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "bnb")
    ours = read(tmp_path / "bnb").state_dict()
    theirs = model.dequantize(torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor.to(torch.bfloat16), rtol=2**-7, atol=0)


REFUSED = [
    ({"quant_method": "gptq", "bits": 4}, r"is quantised \(gptq\), which is not read: fp8.*convert_hf_to_gguf"),
    ({"quant_method": "hqq"}, r"is quantised \(hqq\)"),
    ({"quant_method": "something-new"}, r"is quantised \(something-new\)"),
    ({"modules_to_not_convert": None}, r"names no quant_method \(it has modules_to_not_convert\)"),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, r"is quantised \(modelopt, W4A16_AWQ\)"),
    ({**compressed(), "format": "marlin-24"}, r"is quantised \(compressed-tensors, marlin-24\)"),
    ({**compressed(), "sparsity_config": {"format": "sparse-24-bitmask"}}, r"compressed-tensors, sparse-24-bitmask"),
    ({"quant_method": "compressed-tensors"}, "has no config_groups"),
    ({**compressed(), "config_groups": {"a": {"targets": None}}}, "has no targets"),
    ({**compressed(), "config_groups": {"a": {"targets": ["re:["]}}}, "is no pattern"),
    (compressed(strategy="group"), "weight_block_size is .1, None.; it must be two"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is .128.; it must be two"),
    ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "must be two whole numbers above 0"),
    ([1], "must be an object"),
]


@pytest.mark.parametrize(("quantization", "message"), REFUSED)
def test_what_cannot_be_read_is_refused_by_its_name(quantization, message, dense_folder, tmp_path):
    config = json.loads((dense_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(ModelError, match=message) as refused:
        load_config(locate(str(tmp_path)))
    assert "None)" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_language_models_own_mark_is_seen(dense_folder, tmp_path):
    config = json.loads((dense_folder / "config.json").read_text())
    config["text_config"] = {"quantization_config": {"quant_method": "quark"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is quantised \(quark\)"):
        load_config(locate(str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale_inv"), "F8_E4M3, and no scale beside it"),
        (
            lambda t: t.update({"model.layers.1.mlp.up_proj.weight_scale_inv": torch.ones(7, 7)}),
            r"with blocks of 2 x 4 by the config that is no scale",
        ),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks 1 weights|does not have"),
    ],
)
def test_numbers_and_scales_must_fit(change, message, tmp_path):
    folder, _ = make("fp8-blocks", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        read(folder)


def test_model_optimizers_numbers_are_never_taken_without_their_scales(tmp_path):
    folder, _ = make("modelopt-fp8", tmp_path)
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds .* in F8_E4M3, and neither quantization_config"):
        slimgpt.load(str(folder))


def test_a_mark_in_both_files_of_model_optimizer(tmp_path):
    """Newer versions write it into config.json, too."""
    folder, scheme = make("modelopt-fp8", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_weights(read(folder), exact_model(tmp_path, scheme))
    (folder / "hf_quant_config.json").unlink()
    assert read(folder).dtype == torch.bfloat16


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="pip install compressed-tensors")
@pytest.mark.parametrize("case", ["awq", "compressed-packed"])
def test_what_a_library_does_not_unpack_is_said_in_one_line(case, tmp_path):
    folder, _ = make(case, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    if case == "awq":
        settings["version"] = "gemv"
    else:
        settings["config_groups"]["group_0"]["weights"]["num_bits"] = 77
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"weight(_packed)? cannot be unpacked: |qweight cannot be unpacked: "
    ) as refused:
        read(folder)
    assert "\n" not in str(refused.value)


def test_groups_of_compressed_tensors_are_told_apart_by_their_patterns():
    """Kimi-K2.5 has FP8 attention and packed experts."""
    packed, wide = {"targets": [r"re:.*\.experts\..*"], "format": "pack-quantized"}, {"targets": ["Linear"]}
    quantization = Quantization("compressed-tensors", "", None, {"config_groups": {"a": wide, "b": packed}})
    assert quantization.group("model.layers.3.mlp.experts.7.up_proj") is packed
    assert quantization.group("model.layers.3.self_attn.q_proj") is wide
    named = {"targets": ["model.layers.3.self_attn.q_proj"]}
    quantization = Quantization("compressed-tensors", "", None, {"config_groups": {"a": wide, "b": named}})
    assert quantization.group("model.layers.3.self_attn.q_proj") is named
    assert quantization.group("model.layers.13.self_attn.q_proj") is wide


@pytest.mark.parametrize(
    ("case", "library"),
    [("awq", "compressed-tensors"), ("compressed-packed", "compressed-tensors"), ("bitsandbytes", "bitsandbytes")],
)
def test_a_library_that_is_not_there_is_named(case, library, tmp_path, monkeypatch):
    def four_bits(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        state = torch.tensor(list(json.dumps({"shape": list(tensor.shape)}).encode()), dtype=torch.uint8)
        packed = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
        return {name: packed, f"{name}.quant_state.bitsandbytes__nf4": state}

    if case == "bitsandbytes":
        folder = q.rewrite(dense(tmp_path, "qwen3"), tmp_path / case, four_bits, {"load_in_4bit": True})
    else:
        folder, _ = make(case, tmp_path)
    monkeypatch.setattr("slimgpt.models.quantization.find_spec", lambda _: None)
    # A plan needs no weights, and so no library.
    assert run("plan", folder, "--ratio", 0.3).exit_code == 0
    with pytest.raises(ModelError, match=rf"and {library}, which unpacks it, is not installed: pip install"):
        read(folder)
