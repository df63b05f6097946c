"""A GGUF file is read with the positions it has, or refused by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers.integrations.gguf.reader import GgufHeader
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import slimgpt
from slimgpt.checkpoint.inspecting import inspect
from slimgpt.errors import ModelError
from slimgpt.exporting.gguf import rope_factors
from slimgpt.models.gguf_file import ROPE_FACTORS, _by_gguf_py, _from_factors, _header
from slimgpt.models.loading import load_config, locate
from tests.models.families import tiny_model, windows

IDS = windows(2, 32)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16},
    "llama3-other": {**LLAMA3, "factor": 3.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 24},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    """A folder and the GGUF file made of it, once for each scaling."""
    made = {}

    def make(name, family="llama"):
        if (name, family) not in made:
            root = tmp_path_factory.mktemp("gguf")
            own = {"llama": {"mlp_bias": False}, "qwen3": {"head_dim": 128}}  # what transformers assumes of Qwen3
            changes = {"attention_bias": False, **own[family]}
            model = tiny_model(family, rope_parameters={"rope_theta": 10000.0, **SCALINGS[name]}, **changes)
            model.save_pretrained(root / "folder")
            tokenizer.save_pretrained(root / "folder")
            slimgpt.export(root / "folder", root / "model.gguf", "gguf", quantize="F32", check=False)
            made[name, family] = root / "folder", root / "model.gguf"
        return made[name, family]

    return make


def logits(path):
    model = slimgpt.load(str(path))[0]
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", SCALINGS)
def test_a_gguf_file_is_read_with_its_positions(name, family, exported):
    folder, file = exported(name, family)
    assert torch.allclose(logits(file), logits(folder), atol=1e-5)
    rope = load_config(locate(str(file))).rope_parameters
    expected = {"rope_theta": 10000.0, **SCALINGS[name]}
    assert {key: rope.get(key) for key in expected} == expected or name == "llama3-other"


def test_the_positions_are_saved_with_what_is_pruned(exported, tmp_path):
    _, file = exported("llama3")
    slimgpt.prune_folder(str(file), tmp_path / "slim", ratio=0.3, calibration=windows(), device="cpu")
    assert slimgpt.load(str(tmp_path / "slim"))[0].config.rope_parameters["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("theta", "head", "change"),
    [
        (500000.0, 128, {"original_max_position_embeddings": 8192}),
        (500000.0, 64, {"original_max_position_embeddings": 8192, "factor": 32.0}),
        (10000.0, 16, {"original_max_position_embeddings": 512, "factor": 2.0}),
        (500000.0, 64, {"original_max_position_embeddings": 8192, "low_freq_factor": 2.0, "high_freq_factor": 5.0}),
        (1e9, 8, {"original_max_position_embeddings": 64}),
    ],
)
def test_llama3_is_told_from_its_factors(theta, head, change):
    config = copy.deepcopy(tiny_model("llama").config)
    config.head_dim = head
    config.rope_parameters = {"rope_theta": theta, **LLAMA3, **change}
    factors = rope_factors(config).double()
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    config.rope_parameters = {"rope_theta": theta, "rope_type": "default"}
    rope = _from_factors("file", factors, config)
    config.rope_parameters = {"rope_theta": theta, **rope}
    assert torch.allclose(ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0], wanted, 1e-5, 0)
    if head >= 64 and "low_freq_factor" not in change:
        assert rope == {**LLAMA3, **change}


def test_factors_that_nothing_computes_are_refused():
    config = tiny_model("llama").config
    size = rope_size(config)
    assert _from_factors("file", torch.ones(size).double(), config) == {}
    assert _from_factors("file", torch.full((size,), 4.0).double(), config) == {"rope_type": "linear", "factor": 4.0}
    uneven = torch.linspace(1, 3, size).double().flip(0)
    with pytest.raises(ModelError, match=r"a\.gguf: rope_freqs.weight divides .* by 1 to 3, and not as llama3's"):
        _from_factors("a.gguf", uneven, config)
    with pytest.raises(ModelError, match=rf"shape \(3,\) must be {size} numbers above 0; give the folder"):
        _from_factors("a.gguf", torch.ones(3).double(), config)


def rope_size(config):
    return config.hidden_size // config.num_attention_heads // 2 if not config.head_dim else config.head_dim // 2


def rewritten(file, target, changes, architecture=None, more=None):
    """A GGUF file with other keys, a value of ``None`` takes one away, and more tensors."""
    reader = GGUFReader(file)
    old = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture or old)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in changes:
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key.replace(old, architecture or old), field.contents(), field.types[0], sub)
    for key, value in changes.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        if value is not None:
            add[type(value)](key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(exported, tmp_path):
    folder, _ = exported("linear")
    _, plain = exported("default")
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        file = rewritten(plain, tmp_path / f"{key}.gguf", {key: 4.0})
        assert torch.allclose(logits(file), logits(folder), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, r"rope\.scaling\.type = 'longrope' is read only as none, linear or"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5 has no count"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier = 0.5 has no counterpart"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -2.0}, "factor = -2.0 must be a number"),
        ({"split.count": 3}, "is one of 3 parts .*llama-gguf-split --merge"),
    ],
)
def test_what_cannot_be_read_right_is_refused_by_key(changes, message, exported, tmp_path):
    file = rewritten(exported("default")[1], tmp_path / "changed.gguf", changes)
    for read in (inspect, slimgpt.load):
        with pytest.raises(ModelError, match=rf"changed\.gguf.*{message}"):
            read(str(file))


def test_scaling_by_keys_and_by_factors_is_refused(exported, tmp_path):
    changes = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    file = rewritten(exported("llama3")[1], tmp_path / "both.gguf", changes)
    with pytest.raises(ModelError, match=r"both\.gguf: .* = 'linear' stands beside rope_freqs\.weight"):
        inspect(str(file))


@pytest.mark.parametrize("scaling", ["default", "yarn", "llama3"])
def test_a_header_is_the_one_that_gguf_py_reads(scaling, exported):
    file = exported(scaling)[1]
    header, reader = _header(file), GGUFReader(file)
    assert header.tensors == {tensor.name for tensor in reader.tensors}
    prefix = f"{header.architecture}.rope."
    expected = {key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if prefix in key}
    assert header.rope == expected != {}
    factors = _by_gguf_py(file, ROPE_FACTORS)
    assert (factors is None) == (header.factors is None) == (scaling != "llama3")
    if factors is not None:
        assert torch.equal(factors, header.factors)


def test_a_type_that_transformers_cannot_place_is_left_to_gguf_py(exported, tmp_path):
    numbers = np.arange(64, dtype=np.int32)
    file = rewritten(exported("llama3")[1], tmp_path / "more.gguf", {}, more={"numbers": numbers})
    with pytest.raises(ValueError, match="ggml type"):
        GgufHeader.from_file(str(file))
    assert torch.equal(_header(file).factors, _header(exported("llama3")[1]).factors)
    assert "numbers" in _header(file).tensors


@pytest.mark.parametrize("architecture", ["deci", "openelm"])
def test_layers_of_different_widths_are_refused_by_name(architecture, exported, tmp_path):
    file = rewritten(exported("default")[1], tmp_path / "slim.gguf", {}, architecture)
    for read in (inspect, slimgpt.load):
        with pytest.raises(
            ModelError, match=f"slim.gguf is of architecture '{architecture}'.*give the folder that was"
        ):
            read(str(file))


def test_a_part_is_told_by_its_name_too(exported, tmp_path):
    file = tmp_path / "model-00001-of-00002.gguf"
    file.write_bytes(exported("default")[1].read_bytes())
    with pytest.raises(ModelError, match="one of 2 parts"):
        inspect(str(file))


@pytest.mark.parametrize("size", [0, 4, 20, 200, 0.5, 0.99])
def test_a_file_that_is_cut_is_refused(size, exported, tmp_path):
    whole = exported("default")[1].read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    for read in (inspect, slimgpt.load):
        with pytest.raises(ModelError, match=r"cut\.gguf cannot be read as GGUF: .*is the file whole\?"):
            read(str(file))


@pytest.mark.parametrize(
    "biases", [{"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_biases_are_read_though_no_key_names_them(biases, tokenizer, tmp_path):
    model = tiny_model("llama", **biases)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    slimgpt.export(tmp_path / "model", tmp_path / "model.gguf", "gguf", quantize="F32", check=False)
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(tmp_path / "model"), rtol=0, atol=1e-5)


def test_tensors_that_the_model_has_not_are_refused(exported, tmp_path):
    """As the experts of Mixtral's files, whose architecture is called llama, too."""
    more = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    target = rewritten(exported("default")[1], tmp_path / "more.gguf", {}, more=more)
    with pytest.raises(ModelError, match=r"a tensor that the model .* the first is blk.0.ffn_gate_inp.weight"):
        slimgpt.load(str(target))


def test_a_tokenizer_that_transformers_does_not_read_is_said_so(exported, tmp_path):
    file = rewritten(exported("default")[1], tmp_path / "other.gguf", {"tokenizer.ggml.model": "nosuch"})
    with pytest.raises(ModelError, match=r"cannot read the tokenizer of 'other\.gguf': (?!.*has none of tokenizer)"):
        slimgpt.load(str(file))
