"""Every reader of a folder sees the same tensors, those that transformers and peft see: no other model, none cut."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import slimgpt
from slimgpt.checkpoint.inspecting import inspect
from slimgpt.cli import app
from slimgpt.config import make_config
from slimgpt.errors import ExportError, ModelError
from slimgpt.exporting.source import open_folder
from slimgpt.models.loading import load_config
from slimgpt.models.source import locate
from slimgpt.pipeline.estimate import forecast
from slimgpt.pipeline.weights_source import open_model
from slimgpt.runtime import devices
from tests.models.families import LAYERS, REPRESENTATIVE, tiny_model, windows

IDS = windows(2, 24, seed=7)
OPTIONS = {"ratio": 0.3, "num_samples": 8, "seq_len": 24, "device": "cpu"}
WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Saves a tiny model with its tokenizer, its config or its tensors changed if asked for."""

    def make(family="llama", tensors=None, name="model", shards=None, config=None, **changes):
        path = tmp_path / name
        model = tiny_model(family, **changes)
        model.save_pretrained(path, **({"max_shard_size": shards} if shards else {}))
        tokenizer.save_pretrained(path)
        if tensors:
            save_file({**load_file(path / WEIGHTS), **tensors}, path / WEIGHTS, {"format": "pt"})
        if config:
            text = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**text, **config}))
        return path

    return make


def streamed(path):
    """The tensors that `prune` takes from a folder, layer by layer."""
    source = locate(str(path))
    config = load_config(source)
    request = SimpleNamespace(
        source=source,
        model_config=config,
        stored=torch.float32,
        dtype="auto",
        trust_remote_code=False,
        device=torch.device("cpu"),
    )
    layers = open_model(request)
    if layers.streamed is None:
        return state(layers.model)
    prefix = f"{layers.streamed.prefix}."
    tensors = {name: tensor for name, tensor in state(layers.model).items() if not name.startswith(prefix)}
    for index in range(config.num_hidden_layers):
        tensors |= {f"{prefix}{index}.{name}": tensor for name, tensor in layers(index).state_dict().items()}
    return tensors


def state(model):
    """A model's tensors by name, the head too where it is tied."""
    return dict(model.state_dict())


def exported(path):
    """The tensors that `export` takes, with those that are tied."""
    source = open_folder(path)
    tensors = {name: source[name] for name in source.names}
    return tensors if source.config.tie_word_embeddings is False else {HEAD: tensors[EMBEDDING], **tensors}


def equal(tensors, expected, reader):
    """Whether two sets of tensors are the same, to the bit."""
    assert tensors.keys() == expected.keys(), reader
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), f"{reader}: {name}"


def all_readers(path):
    """The tensors of a folder, by whoever reads it."""
    yield "load", state(slimgpt.load(str(path))[0])
    yield "stream", streamed(path)
    if not locate(str(path)).adapter:
        yield "export", exported(path)


def head(seed=3):
    """An output head like no embedding."""
    return torch.randn(97, 48, generator=torch.Generator().manual_seed(seed))


TABLE = {
    "one file": {},
    "shards": {"shards": "40KB"},
    "untied": {"tie_word_embeddings": False},
    "untied, shards": {"tie_word_embeddings": False, "shards": "40KB"},
    "a head of its own": {"tensors": {HEAD: head()}},
    "rotary frequencies": {"tensors": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": head() for i in range(4)}},
}


@pytest.mark.parametrize("case", TABLE)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.filterwarnings("ignore:.*read as untied")
def test_all_readers_see_what_transformers_sees(family, case, folder):
    path = folder(family, **TABLE[case])
    expected = state(AutoModelForCausalLM.from_pretrained(path))
    for reader, tensors in all_readers(path):
        equal(tensors, expected, reader)


OTHER_FAMILIES = [name for name in REPRESENTATIVE if name not in ("llama", "qwen2", "gemma3_text")]


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_all_readers_see_shards_of_other_families_alike(family, folder):
    path = folder(family, shards="40KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    expected = state(AutoModelForCausalLM.from_pretrained(path))
    equal(state(slimgpt.load(str(path))[0]), expected, "load")
    equal(streamed(path), expected, "stream")
    source = open_folder(path)
    equal({name: source[name] for name in source.names}, {name: expected[name] for name in source.names}, "export")
    parameters = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())  # tied ones once, no buffers
    assert parameters.keys() <= set(source.names)


def evaluated(path, text_file, tmp_path):
    """The cross-entropy that `evaluate` gives for a text, and the ids that it is of."""
    file = tmp_path / "evaluated.json"
    words = ["evaluate", path, "--text", text_file, "--window", 24, "--max-tokens", 240, "--batch-size", 1]
    words += ["--engine", "transformers", "--device", "cpu", "--json", file, "--overwrite"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return math.log(json.loads(file.read_text())["perplexity"])


def recovered(path, text_file, tmp_path):
    """The tensors that `recover` trains, by a step too small to move them."""
    settings = {"max_steps": 1, "max_length": 24, "batch_size": 4, "held_out": 0, "evaluations": 1, "bf16": False}
    out = tmp_path / "recovered"
    slimgpt.recover(
        path, out, str(text_file), method="full", learning_rate=1e-30, device="cpu", overwrite=True, **settings
    )
    return state(slimgpt.load(str(out))[0])


def cross_entropy(model, tokenizer, text_file):
    """What plain transformers makes of the same text."""
    ids = torch.tensor(tokenizer(text_file.read_text())["input_ids"][:240]).view(10, 24)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


READ_BY_BOTH = [
    *(("llama", case) for case in (*TABLE, "an adapter")),
    ("qwen2", "untied, shards"),
    ("gemma3_text", "a head of its own"),
    ("gpt2", "shards"),
    ("phi3", "untied"),
]


@pytest.mark.parametrize(("family", "case"), READ_BY_BOTH)
@pytest.mark.filterwarnings("ignore:.*untied")
def test_evaluate_and_recover_see_it_too(family, case, folder, adapter, text_file, tmp_path):
    if case == "an adapter":
        path, _ = adapter(target_modules=["q_proj", "lm_head"])
        plain = slimgpt.load(str(path))[0]  # held to peft's own logits below
    else:
        path = folder(family, **TABLE[case])
        plain = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = slimgpt.load(str(path))[1]
    assert evaluated(path, text_file, tmp_path) == pytest.approx(cross_entropy(plain, tokenizer, text_file), abs=1e-5)
    equal(recovered(path, text_file, tmp_path), state(plain), "recover")


ROPE = {"rope_theta": 10000.0}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}

AS_GGUF = {
    "llama": {"mlp_bias": False, "attention_bias": False},
    "mistral": {"sliding_window": None, "head_dim": 8, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 128, "attention_bias": False},
}
"""What transformers assumes of a family where it reads GGUF."""


IN_EVERY_RUN = {("llama", "yarn"), ("mistral", "linear"), ("qwen3", "llama3")}
"""Every family, each with another scaling; `test_gguf_file.py` reads two families with every one."""


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        pytest.param(name, rope, marks=[pytest.mark.families] + [pytest.mark.slow] * ((name, rope) not in IN_EVERY_RUN))
        for name in AS_GGUF
        for rope in ROPES
    ],
)
def test_a_gguf_file_is_the_folder_that_it_was_made_from(name, rope, folder, text_file, tmp_path):
    path = folder(name, rope_parameters={**ROPE, **ROPES[rope]}, **AS_GGUF[name])
    text = tmp_path / "text.txt"  # without line ends, which the tiny vocabulary lacks: one reader drops them
    text.write_text(text_file.read_text().replace("\n", " "))
    file = tmp_path / "model.gguf"
    slimgpt.export(path, file, "gguf", quantize="F32", check=False)
    plain = AutoModelForCausalLM.from_pretrained(path)
    tensors = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    for reader, read in (
        ("transformers", state(tensors)),
        ("load", state(slimgpt.load(str(file))[0])),
        ("stream", streamed(file)),
        ("recover", recovered(file, text, tmp_path)),
    ):
        equal(read, state(plain), reader)
    tokenizer = slimgpt.load(str(path))[1]
    expected = cross_entropy(plain, tokenizer, text)  # with the folder's positions
    assert evaluated(file, text, tmp_path) == pytest.approx(expected, abs=1e-5)
    small = {**OPTIONS, "ratio": 0.1, "distill": "off", "calibration": str(text)}
    for out, source in (("from file", file), ("from folder", path)):
        slimgpt.prune_folder(str(source), tmp_path / out, **small)
    slim = [slimgpt.load(str(tmp_path / out))[0] for out in ("from file", "from folder")]
    with torch.no_grad():
        torch.testing.assert_close(slim[0](IDS).logits, slim[1](IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_file_of_16_bits_is_run_in_them_where_that_is_faster(folder, text_file, tmp_path, monkeypatch):
    path = folder("llama", rope_parameters=ROPE, **AS_GGUF["llama"])
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text().replace("\n", " "))
    monkeypatch.setattr(devices, "_cpu_seconds", lambda dtype: float(dtype == torch.float32))
    for bits, run_in in (("F16", "bfloat16"), ("F32", "float32")):
        file = tmp_path / f"{bits}.gguf"
        slimgpt.export(path, file, "gguf", quantize=bits, check=False)
        options = {**OPTIONS, "ratio": 0.1, "distill": "off", "calibration": str(text)}
        report = slimgpt.prune_folder(str(file), tmp_path / bits, **options)
        assert report.execution["forward_dtype"] == run_in
        assert {tensor.dtype for tensor in load_file(tmp_path / bits / WEIGHTS).values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*read as untied")
def test_a_head_of_its_own_is_counted_pruned_and_saved(folder, text_file, tmp_path):
    path = folder(tensors={HEAD: head()})
    with pytest.warns(UserWarning, match="lm_head.weight differs from the input embedding; it is read as untied"):
        config = load_config(locate(str(path)))
    assert config.tie_word_embeddings is False
    assert inspect(str(path)).parameters == sum(t.numel() for t in load_file(path / WEIGHTS).values())
    slimgpt.prune_folder(str(path), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    plain = AutoModelForCausalLM.from_pretrained(path)
    report = slimgpt.prune(plain, slimgpt.load(str(path))[1], calibration=str(text_file), **OPTIONS)
    slimgpt.save(plain, None, report, tmp_path / "saved")
    for name in ("slim", "saved"):
        model, _ = slimgpt.load(str(tmp_path / name)) if name == "slim" else (slimgpt_model(tmp_path / name), None)
        assert torch.equal(model.lm_head.weight, head()), name
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight), name
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    slimgpt.export(path, tmp_path / "exported", "hf-uniform", check=False)
    equal(
        state(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")),
        state(AutoModelForCausalLM.from_pretrained(path)),
        "exported",
    )


def slimgpt_model(path):
    """A model saved without a tokenizer."""
    from slimgpt.models.loading import load_model

    source = locate(str(path))
    return load_model(source, load_config(source))


def test_a_head_equal_to_the_bit_stays_tied(folder):
    path = folder()
    save_file({**load_file(path / WEIGHTS), HEAD: load_file(path / WEIGHTS)[EMBEDDING].clone()}, path / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config(locate(str(path))).tie_word_embeddings is True
    assert inspect(str(path)).parameters == sum(p.numel() for p in tiny_model("llama").parameters())


ADAPTERS = {
    "matrices of layers": {"target_modules": ["q_proj", "down_proj"]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head and embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "the head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.fixture
def adapter(folder, tmp_path):
    """Saves a random adapter for a tiny model, and gives its folder and the logits of the two together."""

    def make(base=None, name="adapter", model=None, **settings):
        base = base or folder()
        model = get_peft_model(
            model or AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=3, init_lora_weights=False, task_type="CAUSAL_LM", **settings),
        ).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "modules_to_save" in key or "trainable_tokens" in key:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / name)
        with torch.no_grad():
            return tmp_path / name, model(IDS).logits

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_merged_as_peft_computes_it(kind, tied, folder, adapter, text_file, tmp_path):
    base = folder(tie_word_embeddings=tied)
    path, expected = adapter(base, **ADAPTERS[kind])
    model, tokenizer = slimgpt.load(str(path))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    equal(streamed(path), state(model), "stream")
    own_head = "head" in kind or "embedding" in kind or not tied
    assert model.config.tie_word_embeddings is not own_head
    assert load_config(locate(str(path))).tie_word_embeddings is not own_head
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not own_head
    if kind == "the head":
        assert torch.equal(model.model.embed_tokens.weight, load_file(base / WEIGHTS)[EMBEDDING])
    slimgpt.save(model, tokenizer, None, tmp_path / "merged")
    again, _ = slimgpt.load(str(tmp_path / "merged"))
    equal(state(again), state(model), "saved")
    assert inspect(str(path)).parameters == sum(p.numel() for p in model.parameters())
    slimgpt.prune_folder(str(path), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    slim, _ = slimgpt.load(str(tmp_path / "slim"))
    assert torch.equal(slim.lm_head.weight, model.lm_head.weight)
    assert torch.equal(slim.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "granite"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_shards_of_other_families(family, folder, adapter):
    path, expected = adapter(folder(family, shards="40KB"), target_modules=["k_proj", "up_proj", "lm_head"])
    model, _ = slimgpt.load(str(path))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    equal(streamed(path), state(model), "stream")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_an_adapter_that_keeps_head_and_embedding_tied_is_refused(adapter):
    path, _ = adapter(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ModelError, match=r"adapter_config.json trains .* sets ensure_weight_tying"):
        slimgpt.load(str(path))


def test_export_takes_no_adapter_and_no_gguf_file(folder, adapter, tmp_path):
    """Neither is a folder of a whole model, so no other model can come of it."""
    base = folder(**AS_GGUF["llama"])
    path, _ = adapter(base, target_modules=["q_proj"])
    slimgpt.export(base, tmp_path / "model.gguf", "gguf", quantize="F32", check=False)
    for name in (path, tmp_path / "model.gguf"):
        with pytest.raises(ExportError, match="is no model folder"):
            slimgpt.export(name, tmp_path / "out", "hf-uniform")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_more_layers_or_other_modules(folder, adapter):
    base = folder()
    path, _ = adapter(base, model=tiny_model("llama", num_hidden_layers=LAYERS + 2), target_modules=["q_proj"])
    with pytest.raises(ModelError, match=r"the model lacks 4 of its tensors.*layers\.4\.self_attn\.q_proj"):
        slimgpt.load(str(path))
    weights = load_file(path / "adapter_model.safetensors")
    few = {name: tensor for name, tensor in weights.items() if "layers.0." in name}
    save_file(few, path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model.safetensors lacks 6 of its tensors"):
        slimgpt.load(str(path))


def test_an_adapter_on_itself(adapter):
    first, _ = adapter(target_modules=["q_proj"])
    settings = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(first)}))
    with pytest.raises(ModelError, match="which is an adapter itself; merge that into its model first"):
        locate(str(first))


def test_an_adapter_beside_a_whole_model_is_left_out(folder, adapter):
    base = folder()
    expected = state(AutoModelForCausalLM.from_pretrained(base))
    path, _ = adapter(base, target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(path / name, base)
    with pytest.warns(UserWarning, match="is read without the adapter"):
        assert locate(str(base)).adapter is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reader, weights in all_readers(base):
            equal(weights, expected, reader)
        equal(
            state(slimgpt.load(str(path))[0]),
            state(
                PeftModel.from_pretrained(
                    AutoModelForCausalLM.from_pretrained(folder(name="clean")), path
                ).merge_and_unload()
            ),
            "the adapter alone",
        )


def test_an_adapter_with_a_config_is_an_adapter(folder, adapter):
    base = folder()
    path, expected = adapter(base, target_modules=["q_proj"])
    shutil.copy(base / "config.json", path)
    assert locate(str(path)).adapter == path
    with torch.no_grad():
        torch.testing.assert_close(slimgpt.load(str(path))[0](IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_files_beside_the_shards_are_not_the_model(folder):
    path = folder(shards="40KB")
    size = inspect(str(path)).bytes
    expected = state(AutoModelForCausalLM.from_pretrained(path))
    (path / "consolidated.safetensors").write_bytes(b"broken")
    assert inspect(str(path)).bytes == size
    for reader, tensors in all_readers(path):
        equal(tensors, expected, reader)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_single_file_beside_older_shards_is_the_model(family, folder, text_file, tmp_path):
    path = folder(family, shards="40KB")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    save_file({name: tensor.clone() for name, tensor in model.named_parameters()}, path / WEIGHTS, {"format": "pt"})
    assert len(list(path.glob("*.safetensors*"))) > 2
    expected = state(AutoModelForCausalLM.from_pretrained(path))
    assert torch.equal(expected[EMBEDDING], model.state_dict()[EMBEDDING])
    for reader, tensors in all_readers(path):
        equal(tensors, expected, reader)
    equal(recovered(path, text_file, tmp_path), expected, "recover")
    assert inspect(str(path)).bytes == (path / WEIGHTS).stat().st_size


DROPPED = {
    "biases": (
        {"config": {"attention_bias": False}},
        r"16 tensors.*first is model\.layers\.0\.self_attn\.k_proj",
    ),
    "layers": ({"num_hidden_layers": 6, "config": {"num_hidden_layers": 4}}, r"the first is model\.layers\.4\."),
    "a score": ({"tensors": {"score.weight": torch.ones(1, 48)}}, r"holds a tensor .* the first is score\.weight"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_tensors_that_the_config_does_not_know_are_refused(case, folder, text_file, tmp_path):
    changes, message = DROPPED[case]
    path = folder(**changes)
    with pytest.raises(ModelError, match=message):
        slimgpt.load(str(path))
    with pytest.raises(ModelError, match=message):
        slimgpt.prune_folder(str(path), tmp_path / "slim", calibration=str(text_file), **OPTIONS)
    assert not (tmp_path / "slim").exists()
    with pytest.raises(ExportError, match=message):
        open_folder(path)


@pytest.mark.parametrize(
    ("family", "shards"),
    [("qwen2", "40KB"), ("gpt2", None), ("gpt2", "40KB"), ("gemma3_text", None), ("phi3", "40KB"), ("mixtral", None)],
)
def test_layers_that_the_config_does_not_count_are_refused(family, shards, folder):
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    path = folder(family, shards=shards)
    config = json.loads((path / "config.json").read_text())
    kinds = {name: config[name][:-1] for name in ("layer_types",) if config.get(name)}
    (path / "config.json").write_text(json.dumps({**config, **kinds, key: config[key] - 1}))
    message = rf"the first is .*\.{config[key] - 1}\."
    with pytest.raises(ModelError, match=message):
        slimgpt.load(str(path))
    with pytest.raises(ModelError, match=message):
        streamed(path)
    with pytest.raises(ExportError, match=message):
        open_folder(path)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"]),
        ("qwen3_5_text", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]),
    ],
)
def test_harmless_tensors_are_left_out(family, names, folder):
    path = folder(family)
    extra = {name: torch.ones(3) for name in names}
    expected = state(AutoModelForCausalLM.from_pretrained(path))
    save_file({**load_file(path / WEIGHTS), **extra}, path / WEIGHTS, {"format": "pt"})
    equal(state(slimgpt.load(str(path))[0]), expected, "load")
    equal(streamed(path), expected, "stream")
    open_folder(path)


@pytest.mark.parametrize("place", ["../outside.safetensors", "ABSOLUTE", "shards/../../outside.safetensors"])
def test_a_shard_outside_the_folder_is_refused_by_every_reader(place, folder, text_file, tmp_path):
    path = folder(shards="40KB")
    shard = sorted(path.glob("model-*"))[0]
    shard.rename(tmp_path / "outside.safetensors")
    (path / "shards").mkdir()
    index = path / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace(shard.name, place.replace("ABSOLUTE", f"{tmp_path}/outside.safetensors"))
    )
    refused_by_all(path, text_file, tmp_path, "lies outside the folder")


def test_a_tensor_in_two_shards_is_refused_by_every_reader(folder, text_file, tmp_path):
    path = folder(shards="40KB")
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second, {"format": "pt"})
    refused_by_all(path, text_file, tmp_path, f"{name} is in {first.name} and in {second.name}; which one is meant")


def refused_by_all(path, text_file, tmp_path, message):
    """Whether every command that reads a model says this in one line, with exit code 2 and nothing written."""
    short = ["--device", "cpu"]
    out = tmp_path / "out"
    for words in (
        ["inspect", path],
        ["plan", path, "--ratio", 0.3],
        ["prune", path, out, "--ratio", 0.3, "--calibration", text_file, "--num-samples", 8, "--seq-len", 24, *short],
        ["evaluate", path, "--text", text_file, "--window", 24, *short],
        ["export", path, out, "--to", "padded"],
        ["export", path, tmp_path / "out.gguf", "--to", "gguf"],
        ["recover", path, out, "--data", text_file, "--max-length", 24, "--max-steps", 1, *short],
        ["speed", path, "--prompt", 8, "--new-tokens", 2, "--no-memory", *short],
        ["generate", path, "river", *short],
    ):
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 2, (words[0], result.output)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert len(errors) == 1, (words[0], result.stderr)
        assert message in errors[0], words[0]
        assert not [file.name for file in tmp_path.iterdir() if "out" in file.name.replace("outside", "")], words[0]


def test_missing_shards_are_refused_before_anything_else(folder):
    path = folder(shards="40KB")
    next(path.glob("model-00002*")).unlink()
    for command in (inspect, lambda name: forecast(name, make_config(ratio=0.3))):
        with pytest.raises(ModelError, match=r"lacks model-00002.*which its index names"):
            command(str(path))


@pytest.mark.parametrize("to", ["hf-uniform", "padded"])
@pytest.mark.parametrize("family", ["lfm3", "olmo_hybrid"])
def test_names_that_transformers_converts_are_exported_by_its_own(family, to, folder, tmp_path):
    path = folder(family)
    slimgpt.export(path, tmp_path / "out", to)
    equal(state(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), state(tiny_model(family)), to)
