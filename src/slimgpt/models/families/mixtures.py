"""Mixtures of experts, as data; the entries join the table of families.

In a layer of experts ``intermediate_size`` is the width of every expert, ``num_experts`` counts them and
``shared_expert_intermediate_size`` is the width of the expert that every token goes to, whatever the config calls them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slimgpt.errors import ModelError
from slimgpt.models.architecture import CHANNELS, Architecture, Entry, Fused
from slimgpt.models.families.dense import ffn, gated, grouped, in_module, latent_heads
from slimgpt.models.families.gemma4 import BY_KIND, gemma4
from slimgpt.models.families.moe import EXPERTS, SHARED, Mixture, experts, shared_expert

# Pieces that many families share.
_QKV = in_module("self_attn", "q_proj", "k_proj", "v_proj")
_HEADS = grouped("self_attn.o_proj", *_QKV)
_GATED_HEADS = grouped("self_attn.o_proj", *_QKV, along=("self_attn.gate_proj",))
_SINKS = grouped("self_attn.o_proj", *_QKV, along=("self_attn.sinks",))
_DENSE = gated("mlp")
_EXPERTS = experts()
_LOCAL, _ROUTED = {EXPERTS: "num_local_experts"}, {EXPERTS: "n_routed_experts"}
_NORM = "one norm spans the queries of all heads, so no head is independent of the others"
_SAME_NAMES = "its layers of linear attention have an output matrix of the same name, whose inputs are no heads"


def _shared(module: str) -> Any:
    return shared_expert(*in_module(module, "down_proj", "gate_proj", "up_proj"))


_SHARED = _shared("mlp.shared_experts")


def _stepped(config: Any, index: int) -> bool:
    dense = index in (config.mlp_only_layers or ())
    return not dense and config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0


def _listed(config: Any, index: int) -> bool:
    if not config.mlp_layer_types:
        raise ModelError(f"mlp_layer_types is missing in the config of the '{config.model_type}'; fetch it again")
    return config.mlp_layer_types[index] == "sparse"


def _after_dense(config: Any, index: int) -> bool:
    return index >= config.first_k_dense_replace


_MIXTRAL = Mixture((*_HEADS, _EXPERTS), width="intermediate_size", fields=_LOCAL)
_QWEN_MOE = Mixture((*_HEADS, _DENSE, _EXPERTS), sparse=_stepped)
_QWEN_SHARED = Mixture((*_HEADS, _DENSE, _shared("mlp.shared_expert"), _EXPERTS), shared=SHARED, sparse=_stepped)
_GRANITE = experts("block_sparse_moe.experts", "block_sparse_moe.router")
_GRANITE_SHARED = shared_expert("shared_mlp.output_linear", Fused("shared_mlp.input_linear", (SHARED, SHARED), (0, 1)))
_COUNTED = Mixture(
    (*_HEADS, _DENSE, _SHARED, _EXPERTS),
    fields=_ROUTED,
    shared_count="n_shared_experts",
    expert_groups="n_group",
    group_least=2,  # the score of a group is the sum of its two best experts
    sparse=_after_dense,
)
_OLMOE = Mixture((_EXPERTS,), width="intermediate_size", refused={"heads": _NORM})
_LINEAR_HYBRID = replace(
    _COUNTED,
    structures=(_DENSE, _SHARED, _EXPERTS),
    fields={},
    shared_count="num_shared_experts",
    expert_groups="num_expert_group",
    sparse=_listed,
    refused={"heads": _SAME_NAMES},
)
_LATENT = replace(_COUNTED, structures=(latent_heads("q_b_proj"), _DENSE, _SHARED, _EXPERTS), sparse=_listed)


def _counted(config: Any, entry: Mixture) -> Mixture:
    """The entry without the shared expert where the config has none."""
    if not isinstance(entry.shared_count, str) or getattr(config, entry.shared_count):
        return entry
    return replace(entry, structures=tuple(s for s in entry.structures if s.unit != "shared"), shared_count=None)


def _glm4_moe(config: Any) -> Mixture:
    return _counted(config, _COUNTED)


def _listed_without_groups(config: Any) -> Mixture:
    return _counted(config, replace(_COUNTED, expert_groups=None, sparse=_listed))


def _deepseek(config: Any) -> Mixture:
    queries = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    by_groups = config.model_type != "deepseek_v2" or config.topk_method == "group_limited_greedy"
    entry = replace(
        _LATENT,
        structures=(latent_heads(queries), _DENSE, _EXPERTS, _SHARED),
        expert_groups="n_group" if by_groups else None,
        group_least=1 if config.model_type == "deepseek_v2" else 2,
        sparse=_after_dense if hasattr(config, "first_k_dense_replace") else _listed,
    )
    return _counted(config, entry)


def _granite(config: Any) -> Architecture:
    """Granite 4: experts beside a shared FFN in every layer, or the shared FFN alone."""
    heads = _SINKS if config.model_type == "granitemoe_swa" else _HEADS
    wide = bool(config.shared_intermediate_size)
    if not config.num_local_experts:
        feed = replace(_GRANITE_SHARED, unit="ffn", inputs=(Fused("shared_mlp.input_linear", (CHANNELS,) * 2, (0, 1)),))
        return Architecture((*heads, replace(feed, sizes=(CHANNELS,))), fields={CHANNELS: "shared_intermediate_size"})
    return Mixture(
        (*heads, *((_GRANITE_SHARED,) if wide else ()), _GRANITE),
        width="intermediate_size",
        shared="shared_intermediate_size" if wide else None,
        fields=_LOCAL,
    )


def _cohere2_moe(config: Any) -> Mixture:
    fields = {CHANNELS: "prefix_dense_intermediate_size"} if "dense" in config.mlp_layer_types else {}
    entry = replace(_COUNTED, fields=fields, width="intermediate_size", shared_count="num_shared_experts")
    return _counted(config, replace(entry, expert_groups=None, group_least=1, sparse=_listed))


def _ernie(config: Any) -> Mixture:
    def sparse(layer: Any, index: int) -> bool:
        step = (index + 1) % layer.moe_layer_interval == 0
        return step and layer.moe_layer_start_index <= index <= layer.moe_layer_end_index

    entry = Mixture(
        (*_HEADS, _DENSE, _SHARED, _EXPERTS),
        fields={EXPERTS: "moe_num_experts"},
        shared_count="moe_num_shared_experts",
        sparse=sparse,
    )
    return _counted(config, entry)


def _jamba(config: Any) -> Architecture:
    dense = gated("feed_forward")
    if config.num_experts < 2:
        return Architecture((*_HEADS, dense))
    return Mixture(
        (*_HEADS, dense, experts("feed_forward.experts", "feed_forward.router")),
        width="intermediate_size",
        sparse=lambda layer, index: layer.layers_num_experts[index] > 1,
    )


def _llama4(config: Any) -> Architecture:
    wide = {CHANNELS: "intermediate_size_mlp"}
    if not config.moe_layers:  # Llama Guard 4
        return Architecture((*_HEADS, gated("feed_forward")), fields=wide)
    entry = Mixture(
        (
            *_HEADS,
            gated("feed_forward"),
            experts("feed_forward.experts", "feed_forward.router", transposed=True, scaled_inputs=True),
            _shared("feed_forward.shared_expert"),
        ),
        width="intermediate_size",
        fields={**_LOCAL, **wide},
        shared_count=1,
        sparse=lambda layer, index: index in layer.moe_layers,
    )
    if config.num_experts_per_tok == 1:
        return entry
    reason = "a token goes to several of them, and their inputs are scaled by the router"
    return replace(entry, structures=tuple(s for s in entry.structures if s.unit != "ffn"), refused={"experts": reason})


def _nemotron_h(config: Any) -> Architecture:
    """A layer is attention, an FFN, experts with a shared one, or a Mamba block, which stays."""
    pieces = {
        "full_attention": grouped("mixer.o_proj", *in_module("mixer", "q_proj", "k_proj", "v_proj")),
        "mlp": (ffn("mixer.down_proj", "mixer.up_proj"),),
        "moe": (
            shared_expert(*in_module("mixer.shared_experts", "down_proj", "up_proj")),
            experts("mixer.experts", "mixer.gate"),
        ),
    }
    structures = tuple(s for kind, own in pieces.items() if kind in config.layers_block_type for s in own)
    if "moe" not in config.layers_block_type:
        return Architecture(structures)
    return Mixture(
        structures,
        fields=_ROUTED,
        shared="moe_shared_expert_intermediate_size",
        matrices=2,
        expert_hidden="hidden_size" if config.moe_latent_size is None else "moe_latent_size",
        expert_groups="n_group",
        group_least=2,
        sparse=lambda layer, index: layer.layers_block_type[index] == "moe",
    )


MIXTURES: dict[str, Entry] = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m2": replace(
        _MIXTRAL,
        structures=(experts("mlp.experts", "mlp.gate", "mlp.e_score_correction_bias"),),
        refused={"heads": _NORM},
    ),
    "qwen2_moe": _QWEN_SHARED,
    "qwen3_moe": _QWEN_MOE,
    "qwen3_next": _QWEN_SHARED,
    "qwen3_5_moe_text": replace(_QWEN_SHARED, sparse=lambda _config, _index: True),
    "flint": replace(_QWEN_SHARED, structures=(*_SINKS, _DENSE, _shared("mlp.shared_expert"), _EXPERTS)),
    "mellum": replace(_QWEN_MOE, fields=_LOCAL, sparse=_listed),
    "llama4_text": _llama4,
    "gemma4_text": gemma4,
    "gemma4_unified_text": gemma4,
    "olmoe": _OLMOE,
    "flex_olmo": _OLMOE,
    "granitemoe": Mixture((*_HEADS, _GRANITE), width="intermediate_size", fields=_LOCAL),
    "granitemoeshared": _granite,
    "granitemoe_swa": _granite,
    "granitemoehybrid": _granite,
    "aria_text": Mixture(
        (*_HEADS, _SHARED, experts(router="mlp.router", transposed=True)),
        width="intermediate_size",
        fields={EXPERTS: "moe_num_experts"},
        shared_count="moe_num_shared_experts",
        per_token="moe_topk",
    ),
    "phimoe": Mixture((*_HEADS, experts(router="mlp.router")), width="intermediate_size", fields=_LOCAL),
    "gpt_oss": Mixture(
        (*_SINKS, experts(router="mlp.router", transposed=True, interleaved=True)),
        width="intermediate_size",
        fields=_LOCAL,
    ),
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "deepseek_v32": _deepseek,
    "glm_moe_dsa": _deepseek,
    "glm4_moe_lite": _deepseek,
    "mistral4": _deepseek,
    "axk1": _deepseek,
    "glm4_moe": _glm4_moe,
    "dots1": _glm4_moe,
    "solar_open": replace(_COUNTED, structures=(*_HEADS, _SHARED, _EXPERTS), sparse=lambda _config, _index: True),
    "exaone_moe": replace(_COUNTED, fields={}, shared_count="num_shared_experts", sparse=_listed),
    "hy_v3": Mixture(
        (*_HEADS, _DENSE, _SHARED, experts("mlp.experts", "mlp.gate", "mlp.e_score_correction_bias")),
        shared_count="num_shared_experts",
        sparse=_listed,
    ),
    "afmoe": Mixture(
        (*_GATED_HEADS, _DENSE, _SHARED, experts("mlp.experts", "mlp.router.gate", "mlp.expert_bias")),
        shared_count="num_shared_experts",
        sparse=lambda config, index: index >= config.num_dense_layers,
    ),
    "beam": Mixture(
        (
            *grouped("self_attn.o_proj", *_QKV, along=("self_attn.gate_proj", "self_attn.gate_bias")),
            _DENSE,
            _EXPERTS,
        ),
        expert_groups="n_group",
        group_least=2,
        sparse=_listed,
    ),
    "kolibri1": Mixture((*_HEADS, _SHARED, _EXPERTS), fields=_LOCAL, shared=SHARED),
    "cohere2_moe": _cohere2_moe,
    "ernie4_5_moe": _ernie,
    "hunyuan_v1_moe": Mixture(
        (*_HEADS, _shared("mlp.shared_mlp"), _EXPERTS), width="intermediate_size", shared_count=1
    ),
    "lfm2_moe": Mixture(
        (
            *grouped("self_attn.out_proj", *_QKV),
            ffn(*in_module("feed_forward", "w2", "w1", "w3")),
            experts("feed_forward.experts", "feed_forward.gate", "feed_forward.expert_bias"),
        ),
        sparse=lambda config, index: index >= config.num_dense_layers,
    ),
    "mimo_v2_flash": replace(
        _COUNTED, structures=(_DENSE, _EXPERTS), shared_count=None, sparse=_listed, refused={"heads": BY_KIND}
    ),
    "laguna": Mixture(
        (_DENSE, _SHARED, _EXPERTS), shared=SHARED, sparse=_listed, refused={"heads": BY_KIND}
    ),
    "nemotron_h": _nemotron_h,
    "jamba": _jamba,
    "kimi_linear": _LINEAR_HYBRID,
    "bailing_hybrid": _LINEAR_HYBRID,
}  # fmt: skip
"""Families with experts by ``config.model_type``."""

_QWEN_VL_MOE = replace(_QWEN_MOE, fields=_LOCAL)

PARTS_WITH_EXPERTS: dict[str, Entry] = {
    "qwen3_vl_moe_text": _QWEN_VL_MOE,
    "qwen3_omni_moe_text": replace(_QWEN_MOE, structures=(*_HEADS, _DENSE, _EXPERTS)),
    "glm4v_moe_text": _glm4_moe,
    "deepseek_ocr2_text": _listed_without_groups,
    "unlimited_ocr_text": _listed_without_groups,
    "minimax_m3_vl_text": Mixture(
        (
            *_HEADS,
            shared_expert(
                "mlp.shared_experts.down_proj", Fused("mlp.shared_experts.gate_up_proj", (SHARED, SHARED), (0, 1))
            ),
            experts("mlp.experts", "mlp.gate", "mlp.e_score_correction_bias"),
        ),
        width="intermediate_size",
        fields={**_LOCAL, CHANNELS: "dense_intermediate_size"},
        shared="shared_intermediate_size",
        sparse=_listed,
    ),
    "step3p5": Mixture(
        (_DENSE, _SHARED, _EXPERTS),
        fields=_ROUTED,
        shared="share_expert_dim",
        sparse=_listed,
        refused={"heads": BY_KIND},
        varying=frozenset(("num_attention_heads",)),
    ),
    "muse_spark_text": Mixture((*_GATED_HEADS, _EXPERTS), fields=_LOCAL),
}
"""Mixtures that exist only inside multimodal models."""
