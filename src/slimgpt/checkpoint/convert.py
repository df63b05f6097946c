"""Checkpoints whose layout is Llama's under other names, written as Llama: Baichuan's and InternLM2's.

Their classes come from their repositories and stack queries, keys and values in one matrix. What they compute is what
transformers' Llama computes, so the matrices are cut apart, tensor by tensor, and no code of the repository runs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from slimgpt.checkpoint.config_file import write_config
from slimgpt.checkpoint.side_files import copy_side_files
from slimgpt.errors import ModelError, one_line
from slimgpt.io.folders import new_folder
from slimgpt.io.shards import write_shards
from slimgpt.io.weight_files import check_regular
from slimgpt.models.build import empty_model
from slimgpt.models.config_files import check_config_files, read_generation_config
from slimgpt.models.source import Source, fetched, locate
from slimgpt.models.streaming import WeightFiles
from slimgpt.runtime.devices import dtype_name
from slimgpt.runtime.thresholds import thresholds

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
SHARD_BYTES = 2 * 10**9
"""Largest shard: what is cut apart stays in memory until its shard is written."""

DERIVED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that follow from the config."""


@dataclass(frozen=True)
class Conversion:
    """Result of a conversion.

    Args:
        model_type: what the model called itself.
        layout: what was cut apart, for people.
        parameters: of the result.
        notes: what is to be looked at.
    """

    path: str
    model_type: str
    layout: str
    parameters: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Layout:
    """Conversion of one family's checkpoint to Llama's.

    Args:
        description: what is cut apart.
        check: why a config, with the text of the model's code, is not Llama under other names; ``None`` if it is.
        names: what a module is called in Llama.
        fused: the end of the name of the stacked matrix, weight or bias.
        split: from that matrix and the config to queries, keys and values.
        config: what of the config has another name in Llama's, or another default.
    """

    description: str
    check: Callable[[Mapping[str, Any], str], str | None]
    names: Mapping[str, str]
    fused: str
    split: Callable[[Tensor, LlamaConfig], Iterable[Tensor]]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]


def _thirds(stacked: Tensor, config: LlamaConfig) -> Iterable[Tensor]:
    """Baichuan: all queries, all keys, all values, as many heads each."""
    return stacked.split(config.hidden_size)


def _by_kv_head(stacked: Tensor, config: LlamaConfig) -> Iterable[Tensor]:
    """InternLM2: for every KV head its query heads, its key and its value."""
    kv_heads = config.num_key_value_heads or config.num_attention_heads
    group = config.num_attention_heads // kv_heads
    blocks = stacked.unflatten(0, (kv_heads, group + 2, -1))
    parts = (blocks[:, :group], blocks[:, group], blocks[:, group + 1])
    return (part.reshape(-1, *stacked.shape[1:]) for part in parts)


def _baichuan_problem(config: Mapping[str, Any], code: str) -> str | None:
    if "max_position_embeddings" not in config or config.get("hidden_size") == 5120 or "alibi" in code.lower():
        return (
            "it has ALiBi's biases in place of rotary positions, as Baichuan-13B and Baichuan2-13B have, and Llama has "
            "none; run it with its own class (--trust-remote-code) and slimgpt.register"
        )
    if config.get("rope_scaling"):
        return f"its config has rope_scaling {config['rope_scaling']!r:.60}, which Baichuan's own code does not read"
    return None


def _internlm2_problem(config: Mapping[str, Any], _code: str) -> str | None:
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        return f"its rope_scaling is {scaling!r:.60}; it must be an object with a type and a factor"
    kind = scaling.get("type", scaling.get("rope_type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        return f"its rotary positions are scaled by '{kind}', which InternLM2's own code does not have"
    return None


LAYOUTS: dict[str, Layout] = {
    "baichuan": Layout(
        "W_pack into queries, keys and values",
        _baichuan_problem,
        {},
        "self_attn.W_pack",
        _thirds,
        lambda config: {"num_key_value_heads": config["num_attention_heads"]},
    ),
    "internlm2": Layout(
        "wqkv, stacked by KV head, into queries, keys and values",
        _internlm2_problem,
        {
            "model.tok_embeddings": "model.embed_tokens",
            "output": "lm_head",
            "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj",
            "feed_forward.w3": "mlp.up_proj",
            "feed_forward.w2": "mlp.down_proj",
            "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        },
        "attention.wqkv",
        _by_kv_head,
        lambda config: {"attention_bias": bool(config.get("bias", True))},
    ),
}
"""By ``model_type``."""


def convert(model: str, output: str | Path, overwrite: bool = False) -> Conversion:
    """Write a checkpoint of Baichuan's (7B) or InternLM2's layout as Llama's; no code of the repository runs.

    Tensors are read one by one, from safetensors alone.

    Args:
        model: a local folder or a hub id.
        output: the folder to write.
        overwrite: replace a model folder of that name.

    Raises:
        ModelError: another layout, one that Llama's class cannot compute, missing or unknown tensors, or pickled files
            alone.
        OutputError: the folder exists, or cannot be written.
    """
    source = locate(model)
    if source.gguf_file or source.adapter is not None:
        raise ModelError(f"{source.name} is no folder of a whole model in safetensors files; nothing was converted")
    source = fetched(source)
    folder = Path(source.location)
    raw = check_config_files(folder)
    model_type = str(raw.get("model_type"))
    layout = LAYOUTS.get(model_type)
    if layout is None:
        raise ModelError(
            f"{source.name} (model_type '{model_type}') has none of the layouts that can be converted: "
            f"{', '.join(LAYOUTS)}; `slimgpt prune` takes the families of `slimgpt families` as they are"
        )
    modules = sorted(folder.glob("modeling*.py"))
    check_regular(modules)
    code = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in modules)
    if (problem := layout.check(raw, code)) is not None:
        raise ModelError(f"{source.name} cannot be written as Llama: {problem}")
    weights = WeightFiles(folder)
    config = _llama_config(source, raw, layout, weights)
    normalised = model_type == "baichuan" and ("NormHead" in code or raw.get("vocab_size") == 125696)
    tensors = _converted(weights, layout, config, normalised)
    _check(source.name, config, weights, layout)
    path = Path(output).expanduser().absolute()
    with new_folder(path, overwrite, inputs=[folder]) as work:
        write_config(config, work)
        write_shards(work, tensors, min(SHARD_BYTES, thresholds().shard_bytes))
        generation = read_generation_config(folder)
        if generation is not None:
            generation.to_json_file(work / "generation_config.json")
        notes = _copy_tokenizer(folder, work)
        copy_side_files(folder, work)
    if normalised:
        notes += ("the rows of the head are normalised, as the model's own code does on every call",)
    return Conversion(str(path), model_type, layout.description, empty_model(config).num_parameters(), notes)


def _llama_config(source: Source, raw: Mapping[str, Any], layout: Layout, weights: WeightFiles) -> LlamaConfig:
    known = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_theta", "rope_scaling"),
    )
    values = {"tie_word_embeddings": False, **{name: raw[name] for name in known if name in raw}}
    dtype = dtype_name(weights.dtype)
    try:
        config = LlamaConfig(**values | layout.config(raw), dtype=dtype, architectures=["LlamaForCausalLM"])
        if config.tie_word_embeddings and _own_head(weights, layout):
            config.tie_word_embeddings = False
        return config
    except KeyError as error:
        raise ModelError(f"the config of '{source.name}' lacks {error}, which its layout needs") from error
    except Exception as error:  # whatever a value in the file made of it
        raise ModelError(f"cannot read the config of '{source.name}': {one_line(error)}") from error


def _own_head(weights: WeightFiles, layout: Layout) -> bool:
    """Whether the files hold a head that is not the embedding."""
    around = {_renamed(name, layout): name for name in weights.slices()}
    head, embedding = (around.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    return None not in (head, embedding) and not torch.equal(weights[str(head)], weights[str(embedding)])


def _renamed(name: str, layout: Layout) -> str:
    """The name of a tensor in Llama; that of a stacked matrix stays."""
    module, _, leaf = name.rpartition(".")
    for old, new in layout.names.items():
        if module == old or module.endswith(f".{old}"):
            return f"{module.removesuffix(old)}{new}.{leaf}"
    return name


def _split_names(name: str, layout: Layout) -> list[str]:
    """The names of queries, keys and values of a stacked matrix; empty for every other tensor."""
    module, _, leaf = name.rpartition(".")
    if not module.endswith(f".{layout.fused}"):
        return []
    prefix = module.removesuffix(layout.fused)
    return [f"{prefix}self_attn.{part}_proj.{leaf}" for part in "qkv"]


def _converted(
    weights: WeightFiles, layout: Layout, config: LlamaConfig, normalised: bool
) -> Iterator[dict[str, Tensor]]:
    """Every tensor of Llama's, in the groups that are read together."""
    for name in weights.slices():
        if name.endswith(DERIVED):
            continue
        tensor = weights[name]
        if parts := _split_names(name, layout):
            yield {part: rows.contiguous() for part, rows in zip(parts, layout.split(tensor, config), strict=True)}
            continue
        renamed = _renamed(name, layout)
        if normalised and renamed == "lm_head.weight":
            tensor = F.normalize(tensor.float()).to(tensor.dtype)
        yield {renamed: tensor}


def _check(name: str, config: LlamaConfig, weights: WeightFiles, layout: Layout) -> None:
    """Refuse files whose tensors are not those of the Llama that they shall become, before anything is written.

    Raises:
        ModelError: with the first that lacks, is unknown, or has another shape.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in empty_model(config).state_dict().items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for key in weights.slices():
        if key.endswith(DERIVED):
            continue
        shape = weights.shape(key)
        if parts := _split_names(key, layout):
            rows = sum(expected[part][0] for part in parts if part in expected)
            if rows and rows != shape[0]:
                raise ModelError(f"{name}: {key} has {shape[0]} rows, and queries, keys and values have {rows}")
            try:
                pieces = list(layout.split(torch.empty(shape, device="meta"), config))
            except (RuntimeError, ValueError, ZeroDivisionError) as error:
                raise ModelError(
                    f"{name}: {key} of shape {shape} cannot be cut into {config.num_attention_heads} query heads and "
                    f"{config.num_key_value_heads} KV heads: {one_line(error)}"
                ) from error
            shapes |= {part: tuple(piece.shape) for part, piece in zip(parts, pieces)}
        else:
            shapes[_renamed(key, layout)] = shape
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := sorted(expected.keys() - shapes.keys() - tied):
        raise ModelError(f"{name}: the files lack what becomes {missing[0]}")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise ModelError(f"{name}: {unknown[0]} has no place in Llama; nothing was converted")
    for key, shape in shapes.items():
        if shape != expected[key]:
            raise ModelError(f"{name}: {key} is {shape} in the files and {expected[key]} by the config")


def _copy_tokenizer(folder: Path, work: Path) -> tuple[str, ...]:
    """Copy the tokenizer's files; one of the repository's own class is named as what reads the same file."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for file in files:
        shutil.copyfile(file, work / file.name)
    settings = folder / TOKENIZER_CONFIG
    values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    own_class = values.pop("auto_map", None) is not None
    if own_class:
        fast = (work / "tokenizer.json").is_file()
        values["tokenizer_class"] = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
    if values:
        (work / TOKENIZER_CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if not files:
        return ("the folder has no tokenizer files; the tokenizer is to be copied by hand",)
    if own_class:
        return (
            f"the tokenizer's own class was not run; its files are read by {values['tokenizer_class']}: compare a few "
            "sentences before you rely on it",
        )
    return ()
