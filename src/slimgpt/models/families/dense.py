"""The decoder families of transformers: what can be removed from each, and why not where something cannot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Architecture, Entry, Fused, Relabel, Structure


def grouped(output: str, *inputs: str | Fused, along: tuple[str, ...] = ()) -> tuple[Structure, Structure]:
    """The two ways to remove heads of grouped-query attention.

    Args:
        inputs: the query, key and value modules, or one :class:`Fused` of all three.
        along: further modules or parameters with rows per query head, such as sinks or output gates.
    """
    queries = tuple(replace(item, sliced=(0,)) if isinstance(item, Fused) else item for item in inputs[:1])
    return (
        Structure("kv", output, (*inputs, *along), (KV_HEADS, HEADS)),
        Structure("query", output, (*queries, *along), (HEADS,), KV_HEADS),
    )


def heads(output: str, *inputs: str | Fused, transposed: bool = False) -> Structure:
    """Multi-head attention: every head has a key and a value of its own."""
    return Structure("kv", output, inputs, (KV_HEADS, HEADS), transposed=transposed)


def latent_heads(queries: str) -> Structure:
    """Multi-head latent attention: keys and values of all heads are made from one latent vector, which stays as it is.

    Every head has rows of its own in the matrices that make queries, and keys and values, from their latents; the
    rotary part of the key is one for all heads.

    Args:
        queries: the module that makes the queries.
    """
    return Structure("kv", "self_attn.o_proj", (f"self_attn.{queries}", "self_attn.kv_b_proj"), (KV_HEADS, HEADS))


def ffn(output: str, *inputs: str | Fused, transposed: bool = False) -> Structure:
    """A feed-forward network whose input modules have one row per channel."""
    return Structure("ffn", output, inputs, (CHANNELS,), transposed=transposed)


def in_module(name: str, *leaves: str) -> tuple[str, ...]:
    """The names of modules in a module."""
    return tuple(f"{name}.{leaf}" for leaf in leaves)


def gated(name: str) -> Structure:
    """The usual gated feed-forward network in a module of this name."""
    return ffn(*in_module(name, "down_proj", "gate_proj", "up_proj"))


# Pieces that many families share.
_QKV = in_module("self_attn", "q_proj", "k_proj", "v_proj")
_GQA = grouped("self_attn.o_proj", *_QKV)
_GATED = gated("mlp")
_PLAIN = ffn("mlp.down_proj", "mlp.up_proj")
_GATE_UP = ffn("mlp.down_proj", Fused("mlp.gate_up_proj", (CHANNELS, CHANNELS), (0, 1)))
_STACKED = (HEADS, KV_HEADS, KV_HEADS)
_FC = ffn("fc2", "fc1")
_LFM_FFN = ffn("feed_forward.w2", "feed_forward.w1", "feed_forward.w3")


def _per_head(module: str) -> Fused:
    """Rows of queries, keys and values by head."""
    return Fused(module, _STACKED, (0, 1, 2), HEADS)


_SEPARATE = Architecture((*_GQA, _GATED))
# What goes with a whole attention: its module, the norm before it, and one behind it.
_PRE_NORM = ("self_attn", "input_layernorm")
_SANDWICH = (*_PRE_NORM, "post_attention_layernorm")
_LLAMA_LIKE = replace(_SEPARATE, attention=_PRE_NORM)
_GEMMA_LIKE = replace(_SEPARATE, attention=_SANDWICH)
LLAMA = replace(_LLAMA_LIKE, relabel=Relabel("mistral", (("sliding_window", None),)))
_UNGATED = Architecture((*_GQA, _PLAIN))
_GLM = Architecture((*_GQA, _GATE_UP))
_PHI3 = Architecture(
    (*grouped("self_attn.o_proj", Fused("self_attn.qkv_proj", _STACKED, (0, 1, 2))), _GATE_UP), attention=_PRE_NORM
)
_GPT2 = Architecture(
    (
        heads("attn.c_proj", Fused("attn.c_attn", (HEADS,) * 3, (0, 1, 2)), transposed=True),
        ffn("mlp.c_proj", "mlp.c_fc", transposed=True),
    ),
    layers="transformer.h",
    fields={CHANNELS: "n_inner"},
    resized=True,
)
_BART_LIKE = (heads("self_attn.out_proj", *_QKV), _FC)
_NORM = "its norm of queries and keys runs over all heads at once, so no head is independent of the others"
_ALIBI = "its ALiBi slopes belong to the places of the heads in the dense model"
_FFN_ONLY = replace(_SEPARATE, structures=(_GATED,), refused={"heads": _NORM})


def _cohere(config: Any) -> Architecture:
    if not getattr(config, "use_qk_norm", False):
        return _SEPARATE
    kv, query = grouped("self_attn.o_proj", *_QKV, along=("self_attn.q_norm",))
    return Architecture((replace(kv, inputs=(*kv.inputs, "self_attn.k_norm")), query, _GATED))


def _falcon(config: Any) -> Architecture:
    blocks = Fused("self_attention.query_key_value", _STACKED, (0, 1, 2), KV_HEADS)
    kv, query = grouped("self_attention.dense", blocks)
    feed = ffn("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")
    base = Architecture((feed,), "transformer.h", {CHANNELS: "ffn_hidden_size", KV_HEADS: "num_kv_heads"}, resized=True)
    if config.alibi:
        return replace(base, refused={"heads": _ALIBI})
    if config.new_decoder_architecture:
        return replace(base, structures=(kv, query, feed))
    if config.multi_query:
        return replace(base, structures=(query, feed), fields={CHANNELS: "ffn_hidden_size"}, defaults={KV_HEADS: 1})
    return replace(base, structures=(kv, feed))


def _gpt_bigcode(config: Any) -> Architecture:
    blocks = Fused("attn.c_attn", _STACKED, (0, 1, 2), KV_HEADS)
    kv, query = grouped("attn.c_proj", blocks)
    base = Architecture((kv, ffn("mlp.c_proj", "mlp.c_fc")), "transformer.h", {CHANNELS: "n_inner"}, resized=True)
    if config.multi_query:
        return replace(base, structures=(query, base.structures[1]), defaults={KV_HEADS: 1})
    return replace(base, fields={**base.fields, KV_HEADS: HEADS})


def _stablelm(config: Any) -> Architecture:
    if config.qk_layernorm:
        reason = "its norms of queries and keys are a list with one module per head"
        return replace(_FFN_ONLY, refused={"heads": reason})
    return replace(_SEPARATE, resized=True)


def _lfm2(config: Any) -> Architecture:
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:  # as its constructor computes it
        width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return Architecture(
        (*grouped("self_attn.out_proj", *_QKV), _LFM_FFN),
        fields={CHANNELS: "ffn_width"},
        defaults={CHANNELS: width},
        resized=True,
    )


def _recurrent_gemma(config: Any) -> Architecture:
    qkv = in_module("temporal_block", "q_proj", "k_proj", "v_proj")
    return Architecture(
        (*grouped("temporal_block.o_proj", *qkv), gated("mlp_block")),
        fields={CHANNELS: "ffn_width"},
        defaults={CHANNELS: config.intermediate_size // 2},
        resized=True,
    )


def _latent(config: Any) -> Architecture:
    return Architecture((latent_heads("q_proj" if config.q_lora_rank is None else "q_b_proj"), _GATED))


def _phi(config: Any) -> Architecture:
    # With norms of queries and keys it takes the head size as hidden_size / heads there.
    structures = (*grouped("self_attn.dense", *_QKV), ffn("mlp.fc2", "mlp.fc1"))
    return Architecture(structures, resized=config.qk_layernorm)


DENSE: dict[str, Entry] = {
    "llama": LLAMA,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma2": _GEMMA_LIKE,
    "gemma3_text": _GEMMA_LIKE,
    "granite": _LLAMA_LIKE,
    "smollm3": _LLAMA_LIKE,
    "phi3": _PHI3,
    "ministral": _LLAMA_LIKE,
    "ministral3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "olmo": _LLAMA_LIKE,
    "olmo2": _FFN_ONLY,
    "olmo3": _FFN_ONLY,
    "exaone4": replace(_SEPARATE, attention=("self_attn", "post_attention_layernorm")),
    "seed_oss": _LLAMA_LIKE,
    "ernie4_5": _LLAMA_LIKE,
    "hunyuan_v1_dense": _LLAMA_LIKE,
    "hyperclovax": _SEPARATE,
    "vaultgemma": _LLAMA_LIKE,
    "cwm": _LLAMA_LIKE,
    "helium": replace(_SEPARATE, resized=True),
    "cohere": _cohere,
    "cohere2": _SEPARATE,
    "glm": replace(_GLM, attention=_PRE_NORM),
    "glm4": replace(_GLM, attention=(*_PRE_NORM, "post_self_attn_layernorm")),
    "arcee": replace(_UNGATED, attention=_PRE_NORM),
    "apertus": _UNGATED,
    "jais2": _UNGATED,
    "nemotron": _UNGATED,
    "nanochat": Architecture((*_GQA, ffn("mlp.fc2", "mlp.fc1"))),
    "starcoder2": Architecture((*_GQA, ffn("mlp.c_proj", "mlp.c_fc"))),
    "granite_swa": Architecture((*grouped("self_attn.o_proj", *_QKV, along=("self_attn.sinks",)), _GATED)),
    "phi": _phi,
    "stablelm": _stablelm,
    "persimmon": Architecture(
        (
            heads("self_attn.dense", _per_head("self_attn.query_key_value")),
            ffn("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
        ),
        resized=True,
    ),
    "gpt_neox": Architecture(
        (
            heads("attention.dense", _per_head("attention.query_key_value")),
            ffn("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
        ),
        layers="gpt_neox.layers",
        resized=True,
    ),
    "gptj": Architecture(
        (heads("attn.out_proj", *in_module("attn", "q_proj", "k_proj", "v_proj")), ffn("mlp.fc_out", "mlp.fc_in")),
        layers="transformer.h",
        fields={CHANNELS: "n_inner"},
        resized=True,
    ),
    "codegen": Architecture(
        (ffn("mlp.fc_out", "mlp.fc_in"),),
        layers="transformer.h",
        fields={CHANNELS: "n_inner"},
        resized=True,
        refused={"heads": "its queries, keys and values lie in four blocks that must stay equal"},
    ),
    "gpt_neo": Architecture(
        (
            heads("attn.attention.out_proj", *in_module("attn.attention", "q_proj", "k_proj", "v_proj")),
            ffn("mlp.c_proj", "mlp.c_fc"),
        ),
        layers="transformer.h",
        resized=True,
    ),
    "gpt2": _GPT2,
    "gpt-sw3": _GPT2,
    "gpt_bigcode": _gpt_bigcode,
    "falcon": _falcon,
    "bloom": Architecture(
        (ffn("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),),
        layers="transformer.h",
        resized=True,
        refused={"heads": _ALIBI},
    ),
    "mpt": Architecture(
        (ffn("ffn.down_proj", "ffn.up_proj"),),
        layers="transformer.blocks",
        resized=True,
        refused={"heads": _ALIBI},
    ),
    "opt": Architecture(_BART_LIKE, "model.decoder.layers", {CHANNELS: "ffn_dim"}, resized=True),
    "xglm": Architecture(_BART_LIKE, "model.layers", {CHANNELS: "ffn_dim"}, resized=True),
    "biogpt": Architecture(_BART_LIKE, "biogpt.layers", resized=True),
    # Hybrids: attention where a layer has it, and the feed-forward network; recurrent and convolutional parts stay.
    "qwen3_5_text": _SEPARATE,
    "falcon_h1": Architecture((*_GQA, gated("feed_forward"))),
    "olmo_hybrid": _FFN_ONLY,
    "lfm2": _lfm2,
    "lfm3": Architecture((*grouped("self_attn.o_proj", *_QKV, along=("self_attn.g_proj",)), _LFM_FFN)),
    "recurrent_gemma": _recurrent_gemma,
    "internlm3": _SEPARATE,
    "iquestcoder": _SEPARATE,
    "doge": replace(_FFN_ONLY, refused={"heads": "its attention mask is made of all value heads together"}),
    "modernbert-decoder": Architecture(
        (
            heads("attn.Wo", *in_module("attn", "q_proj", "k_proj", "v_proj")),
            ffn("mlp.Wo", Fused("mlp.Wi", (CHANNELS, CHANNELS), (0, 1))),
        ),
        resized=True,
    ),
    "minicpm3": _latent,
    "youtu": _latent,
    "diffllama": replace(_FFN_ONLY, refused={"heads": "its heads work in pairs that subtract from one another"}),
}
"""Families without experts by ``config.model_type``."""
