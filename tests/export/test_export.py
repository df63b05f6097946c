"""Every form against the slim folder it was made from; what a form cannot hold is refused before any work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, TokenType, dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.cli import app
from slimgpt.errors import ExportError, NumericalError, OutputError
from slimgpt.exporting import FORMATS, check_format
from slimgpt.exporting.gguf import interleave, rope_factors
from slimgpt.exporting.gguf_tokenizer import pre_tokenizer
from slimgpt.exporting.nemotron import ffn_mult
from slimgpt.exporting.source import open_folder
from tests.models.families import CORE, tiny_model, windows

IDS = windows(2, 32)  # 64 tokens: activation functions take whole vectors at any width, which keeps the last bit
OPTIONS = {"ratio": 0.3, "device": "cpu", "calibration": windows()}
GGUF_FITS = {
    "llama": {},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-plain": {"attention_bias": False, "mlp_bias": False},
    "llama-scaled": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        }
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None, "layer_types": None, "vocab_size": 101},
    "qwen3": {"attention_bias": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def slim(tmp_path_factory, tokenizer):
    """A slim folder of a family, made once: ``(family, changes, options of prune)``."""
    made: dict[str, Path] = {}

    def make(family: str, changes: dict | None = None, **options) -> Path:
        key = repr((family, changes, options))
        if key not in made:
            folder = tmp_path_factory.mktemp("slim") / family
            model = tiny_model(family.partition("-")[0], **(changes or {}))
            report = slimgpt.prune(model, None, **{**OPTIONS, **options})
            slimgpt.save(model, tokenizer, report, folder)
            made[key] = folder
        return made[key]

    return make


def logits(folder: Path, stock: bool = False) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder) if stock else slimgpt.load(str(folder))[0]
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("unit", ["kv", "query"])
@pytest.mark.parametrize("family", CORE)
def test_padded_is_equal_to_the_bit(family, unit, slim, tmp_path):
    # Phi-3 runs its activation row by row: only rows of whole pairs of vectors keep the last bit.
    wide = ({"intermediate_size": 160}, 32) if family == "phi3" else ({}, 1)
    folder = slim(family, wide[0], head_unit=unit, round_to=wide[1])
    report = slimgpt.export(folder, tmp_path / "padded", "padded")
    assert report.verification.identical
    assert report.verification.continuations == (5, 5)
    assert torch.equal(logits(tmp_path / "padded", stock=True), logits(folder))
    assert not list((tmp_path / "padded").glob("*.py"))


@pytest.mark.parametrize("family", CORE)
def test_uniform_is_a_stock_class_of_the_same_function(family, slim, tmp_path):
    folder = slim(family, uniform=True)
    report = slimgpt.export(folder, tmp_path / "stock", "hf-uniform")
    assert report.verification.identical
    assert torch.equal(logits(tmp_path / "stock", stock=True), logits(folder))


def test_nemotron_keeps_weights_and_says_widths_by_multipliers(tmp_path, tokenizer):
    model = tiny_model("llama", attention_bias=False, mlp_bias=False, num_attention_heads=4, num_key_value_heads=2,
                       head_dim=12, intermediate_size=1024)  # fmt: skip
    widths = [1024, 512, 768, 256]
    lines = [f"{{num_attention_heads = 4, num_key_value_heads = 2, intermediate_size = {w}}}" for w in widths]
    plan = tmp_path / "plan.toml"
    plan.write_text('head_unit = "kv"\nlayers = [' + ", ".join(lines) + "]\n")
    report = slimgpt.prune(model, None, plan=str(plan), calibration=windows(), device="cpu")
    slimgpt.save(model, tokenizer, report, tmp_path / "slim")
    done = slimgpt.export(tmp_path / "slim", tmp_path / "nemotron", "nemotron-nas")
    assert done.verification is None
    assert "vLLM" in done.unverified
    config = json.loads((tmp_path / "nemotron" / "config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    multipliers = [block["ffn"]["ffn_mult"] for block in config["block_configs"]]
    assert [-(-int(2 * m * 48 / 3) // 256) * 256 for m in multipliers] == widths
    assert {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} == {2}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("slim", "nemotron"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("hidden", [576, 2048, 3072, 4096, 8192])
def test_multipliers_give_every_width_back(hidden):
    for width in range(256, 4 * hidden, 256):
        assert -(-int(2 * ffn_mult(width, hidden) * hidden / 3) // 256) * 256 == width


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", GGUF_FITS)
def test_gguf_holds_every_tensor_and_width(name, uniform, slim, tmp_path):
    folder = slim(name, GGUF_FITS[name], uniform=uniform)
    file = tmp_path / "slim.gguf"
    slimgpt.export(folder, file, "gguf", quantize="F32", check=False)
    reader = GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    arch = fields["general.architecture"]
    expected = {"qwen2": "deci", "qwen3": "qwen3" if uniform else "openelm"}
    assert arch == expected.get(name, "llama" if uniform else "deci")
    exported = open_folder(folder)
    for field, key in (
        ("num_attention_heads", "attention.head_count"),
        ("num_key_value_heads", "attention.head_count_kv"),
        ("intermediate_size", "feed_forward_length"),
    ):
        value = fields[f"{arch}.{key}"]
        widths = [sizes[field] for sizes in exported.sizes]
        assert (value if isinstance(value, list) else [value] * len(widths)) == widths
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    used = {"rope_freqs.weight"} if "rope_freqs.weight" in tensors else set()
    assert bool(used) == (name == "llama-scaled")
    for index, sizes in enumerate(exported.sizes):
        state = exported.layer(index)
        for leaf in ("weight", "bias"):
            parts = [state.get(f"self_attn.{p}_proj.{leaf}") for p in "qkv"]
            if parts[0] is None:
                continue
            if arch == "openelm":
                assert torch.equal(tensors[f"blk.{index}.attn_qkv.{leaf}"], torch.cat(parts))
                used.add(f"blk.{index}.attn_qkv.{leaf}")
                continue
            if arch in ("llama", "deci"):
                counts = sizes["num_attention_heads"], sizes["num_key_value_heads"]
                parts = [*(interleave(part, heads) for part, heads in zip(parts, counts)), parts[2]]
            for part, letter in zip(parts, "qkv"):
                assert torch.equal(tensors[f"blk.{index}.attn_{letter}.{leaf}"], part)
                used.add(f"blk.{index}.attn_{letter}.{leaf}")
        for module, short in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down"),
                              ("mlp.up_proj", "ffn_up"), ("mlp.gate_proj", "ffn_gate"),
                              ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
                              ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")):  # fmt: skip
            for leaf in ("weight", "bias"):
                if f"{module}.{leaf}" in state:
                    assert torch.equal(tensors[f"blk.{index}.{short}.{leaf}"], state[f"{module}.{leaf}"])
                    used.add(f"blk.{index}.{short}.{leaf}")
    assert torch.equal(tensors["token_embd.weight"], exported["model.embed_tokens.weight"])
    assert torch.equal(tensors["output_norm.weight"], exported["model.norm.weight"])
    used |= {"token_embd.weight", "output_norm.weight"}
    if "lm_head.weight" in exported.names:
        assert torch.equal(tensors["output.weight"], exported["lm_head.weight"])
        used.add("output.weight")
    assert used == tensors.keys()


def test_rotating_interleaved_pairs_is_rotating_halves():
    """Llama.cpp's NORM rotation of interleaved rows equals Hugging Face's rotation of halves."""
    d, heads = 8, 3
    rows = torch.randn(heads * d, dtype=torch.float64)
    angles = torch.rand(d // 2, dtype=torch.float64)
    halves = rows.view(heads, 2, d // 2)
    a, b = halves[:, 0], halves[:, 1]
    hf = torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 1).flatten()
    pairs = interleave(rows, heads).view(heads, d // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    norm = torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).flatten()
    torch.testing.assert_close(interleave(hf, heads), norm)


def test_scaled_positions_become_factors_of_the_frequencies():
    config = tiny_model("llama", **GGUF_FITS["llama-scaled"]).config
    factors = rope_factors(config)
    plain = 1 / 10000.0 ** (torch.arange(0, 10, 2) / 10)
    model = AutoModelForCausalLM.from_config(config)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)
    assert factors.max() == 8


def test_quantised_gguf_and_rows_that_do_not_divide(slim, tmp_path):
    wide = {
        "intermediate_size": 128,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    folder = slim("llama-plain", {**GGUF_FITS["llama-plain"], **wide})
    report = slimgpt.export(folder, tmp_path / "slim.gguf", "gguf", quantize="Q8_0", check=False)
    assert "stayed F16" in report.notes[0]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "slim.gguf").tensors}
    assert kinds["blk.0.ffn_gate.weight"] == "Q8_0"
    assert "F16" in {kind for name, kind in kinds.items() if "ffn_down" in name or "attn_output" in name}
    assert kinds["blk.0.ffn_norm.weight"] == "F32"
    tensor = next(t for t in GGUFReader(tmp_path / "slim.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    stored = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    exact = open_folder(folder).layer(1)["mlp.up_proj.weight"]
    assert (stored - exact).abs().max() < 0.01 * exact.abs().max()


def test_gguf_carries_the_tokenizer_and_the_chat_template(tmp_path, tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    try:
        model = tiny_model("llama", vocab_size=103)
        model.save_pretrained(tmp_path / "dense")
        tokenizer.save_pretrained(tmp_path / "dense")
        slimgpt.export(tmp_path / "dense", tmp_path / "dense.gguf", "gguf", check=False)
    finally:
        tokenizer.chat_template = None
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "dense.gguf").fields.items()}
    assert fields["tokenizer.chat_template"] == "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 103
    vocabulary = tokenizer.get_vocab()
    assert all(tokens[index] == token for token, index in vocabulary.items())
    assert types[tokenizer.eos_token_id] == TokenType.CONTROL
    assert types[102] == TokenType.UNUSED
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.merges"]) == len(
        json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    )


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ([{"type": "ByteLevel", "use_regex": True}], "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}], "smollm"),
        ([{"type": "Split", "pattern": {"Regex": r"'s|\p{N}{1,3}"}}, {"type": "ByteLevel", "use_regex": False}],
         "llama-bpe"),
        ([{"type": "Split", "pattern": {"Regex": r"(?i:'s|'t|'re)|\p{N}| ?[^\s]+"}},
          {"type": "ByteLevel", "use_regex": False}], "qwen2"),
    ],
)  # fmt: skip
def test_pre_tokenizers_by_llama_cpps_names(parts, name):
    assert pre_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": parts}}) == name


def test_an_unknown_pre_tokenizer_says_what_to_pass():
    parts = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "x"}}]}
    with pytest.raises(ExportError, match="--tokenizer-pre"):
        pre_tokenizer({"pre_tokenizer": parts})


# Refusals


@pytest.mark.parametrize(
    ("family", "changes", "options", "to", "message"),
    [
        ("gemma2", {}, {}, "gguf", "'gemma2' is none.*--to padded"),
        ("phi3", {}, {"uniform": True}, "gguf", "'phi3' is none.*--to hf-uniform"),
        ("mistral", {}, {}, "gguf", "sliding window of 5 tokens.*--to padded"),
        ("qwen3", {}, {}, "gguf", "biases.*--to padded"),
        ("qwen3", {"attention_bias": False, "tie_word_embeddings": False}, {}, "gguf", "no output matrix.*--uniform"),
        ("llama", {}, {}, "hf-uniform", "differ in width.*--to padded"),
        ("llama", {}, {}, "nemotron-nas", "no biases.*--to padded"),
        ("qwen3", {}, {}, "nemotron-nas", "is a Llama"),
        ("mistral", {}, {}, "onnx", "sliding window of 5 tokens"),
        ("gemma2", {}, {}, "openvino", "layers of 'sliding_attention'"),
        ("llama", {}, {}, "tflite", "unknown; choose gguf"),
    ],
)
def test_refused_before_any_work(family, changes, options, to, message, slim, tmp_path):
    folder = slim(family, changes, **options)
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    with pytest.raises(ExportError, match=message):
        slimgpt.export(folder, out, to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", CORE)
def test_what_a_plan_says_of_a_form_is_what_export_does(family, uniform, slim, tmp_path):
    folder = slim(family, uniform=uniform)
    exported = open_folder(folder)
    for to in ("gguf", "hf-uniform", "padded", "nemotron-nas"):
        out = tmp_path / f"{to}.gguf" if to == "gguf" else tmp_path / to
        try:
            check_format(to, exported.config, exported.sizes)
        except ExportError:
            with pytest.raises(ExportError):
                slimgpt.export(folder, out, to, check=False)
        else:
            slimgpt.export(folder, out, to, check=False)
            assert out.exists()


def test_k_quants_need_the_quantiser(slim, tmp_path, monkeypatch):
    monkeypatch.setattr("slimgpt.exporting.gguf._llama_types", dict)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ExportError, match=r"llama\.cpp's own quantiser"):
        slimgpt.export(slim("llama"), tmp_path / "slim.gguf", "gguf", quantize="Q4_K_M")
    assert list(tmp_path.iterdir()) == []


def test_targets_that_exist_or_have_other_names(slim, tmp_path):
    folder = slim("llama")
    with pytest.raises(OutputError, match=r"does not end in \.gguf"):
        slimgpt.export(folder, tmp_path / "slim.bin", "gguf")
    (tmp_path / "slim.gguf").write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        slimgpt.export(folder, tmp_path / "slim.gguf", "gguf")
    assert (tmp_path / "slim.gguf").read_text() == "precious"
    slimgpt.export(folder, tmp_path / "slim.gguf", "gguf", overwrite=True, check=False)
    assert (tmp_path / "slim.gguf").read_bytes()[:4] == b"GGUF"
    (tmp_path / "padded").mkdir()
    (tmp_path / "padded" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match="exists"):
        slimgpt.export(folder, tmp_path / "padded", "padded")
    with pytest.raises(OutputError, match="a folder will be written"):
        slimgpt.export(folder, tmp_path / "padded.gguf", "padded")
    with pytest.raises(OutputError, match="the model that is read"):
        slimgpt.export(folder, folder, "padded", overwrite=True)
    with pytest.raises(ExportError, match="padded is none"):
        slimgpt.export(folder, tmp_path / "other", "padded", quantize="Q8_0")
    with pytest.raises(ExportError, match=r"no type of llama\.cpp's; the nearest are .*Q4_K_M"):
        slimgpt.export(folder, tmp_path / "other.gguf", "gguf", quantize="Q4_KM")
    with pytest.raises(OutputError, match="cannot write"):
        slimgpt.export(folder, tmp_path / "no" / "slim.gguf", "gguf")


@pytest.mark.parametrize("to", ["gguf", "padded"])
def test_an_interrupted_export_leaves_nothing(to, slim, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    target = "gguf.GGUFWriter.write_tensor_data" if to == "gguf" else "slimgpt.exporting.hf_folder.write_rest"
    monkeypatch.setattr(target, stop)
    with pytest.raises(KeyboardInterrupt):
        slimgpt.export(slim("llama"), tmp_path / ("slim.gguf" if to == "gguf" else "slim"), to)
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import json, resource, signal, sys
from typer.testing import CliRunner
from slimgpt.cli import app

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
slim, gguf, padded = sys.argv[1:]
commands = [["export", slim, gguf, "--to", "gguf"], ["export", slim, padded, "--to", "padded"]]
print(json.dumps([(done.exit_code, done.stderr) for done in (CliRunner().invoke(app, words) for words in commands)]))
"""


def test_a_full_disk_leaves_nothing(slim, tmp_path):
    """In a process of its own, where no file may grow past 20 kB."""
    words = [str(slim("llama")), str(tmp_path / "slim.gguf"), str(tmp_path / "slim")]
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for code, stderr in json.loads(done.stdout):
        assert code == 2, stderr
        assert "nothing was left there" in " ".join(stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_commands_export_and_verify(slim, tmp_path):
    folder = slim("llama")
    result = CliRunner().invoke(
        app, ["export", str(folder), str(tmp_path / "padded"), "--to", "padded", "--json", str(tmp_path / "e.json")]
    )
    assert result.exit_code == 0, result.output
    assert "equal to the bit" in result.output
    assert json.loads((tmp_path / "e.json").read_text())["verification"]["identical"] is True
    for card in (folder / "README.md", tmp_path / "padded" / "README.md"):
        assert card.read_text().count("- `padded` (padded, ") == 1
        assert "logits equal to the bit" in card.read_text()
    result = CliRunner().invoke(
        app, ["verify", str(tmp_path / "padded"), "--against", str(folder), "--json", str(tmp_path / "v.json")]
    )
    assert result.exit_code == 0, result.output
    verification = json.loads((tmp_path / "v.json").read_text())
    assert verification["difference"] == 0
    assert verification["continuations"] == [5, 5]
    result = CliRunner().invoke(app, ["verify", str(folder / "nothing"), "--against", str(folder)])
    assert result.exit_code == 2


def test_verification_sees_a_difference(slim, tmp_path, tokenizer):
    """A check that cannot fail would be worth nothing."""
    folder = slim("llama")
    slimgpt.export(folder, tmp_path / "padded", "padded", check=False)
    weights = load_file(tmp_path / "padded" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0] += 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    verification = slimgpt.verify(tmp_path / "broken", folder)
    assert not verification.identical
    assert abs(verification.difference) > 0.001


def test_prune_and_export_in_one_command(dense_folder, text_file, tmp_path):
    words = ["prune", dense_folder, tmp_path / "slim", "--calibration", text_file, "--num-samples", 8, "--seq-len", 24,
             "--device", "cpu"]  # fmt: skip
    runner = CliRunner()
    refused = runner.invoke(app, [str(word) for word in [*words, "--export", "hf-uniform"]])
    assert refused.exit_code == 2
    assert "--to padded" in " ".join(refused.output.split())
    assert list(tmp_path.iterdir()) == []
    done = runner.invoke(app, [str(word) for word in [*words, "--export", "padded"]])
    assert done.exit_code == 0, done.output
    assert torch.equal(logits(tmp_path / "slim-padded", stock=True), logits(tmp_path / "slim"))


def test_formats_are_those_of_the_help():
    text = CliRunner().invoke(app, ["export", "--help"]).output
    assert all(name in " ".join(text.split()) for name in FORMATS)


@pytest.mark.parametrize("to", ["padded", "gguf"])
def test_weights_that_are_no_numbers_are_refused_unverified_too(to, tmp_path, tokenizer):
    folder, target = tmp_path / "damaged", tmp_path / ("x.gguf" if to == "gguf" else "x")
    tiny_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericalError, match=r"NaN or infinity in model\.norm\.weight"):
        slimgpt.export(folder, target, to, check=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]
