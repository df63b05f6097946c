"""Mixtures of experts and multi-head latent attention, as data; the entries join the table of families.

In a layer of experts ``intermediate_size`` is the width of every expert, ``num_experts`` counts them and
``shared_expert_intermediate_size`` is the width of the expert that every token goes to, whatever the config calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimgpt.models.architecture import CHANNELS, HEADS, KV_HEADS, Architecture, Entry, Sizes, Structure
from slimgpt.models.families.dense import ffn, grouped, in_module

EXPERTS, SHARED = "num_experts", "shared_expert_intermediate_size"


def ffn_text(sizes: Sizes) -> str:
    """The width of a layer's FFN for people: ``14336``, or ``8 x 14336 + 2048`` for experts and a shared one."""
    if EXPERTS not in sizes:
        return str(sizes[CHANNELS])
    return f"{sizes[EXPERTS]} x {sizes[CHANNELS]}" + (f" + {sizes[SHARED]}" if SHARED in sizes else "")


Sparse = Callable[[Any, int], bool]
"""Whether the layer of this index, in a model of this config, has experts."""


@dataclass(frozen=True)
class Experts(Structure):
    """The experts of a layer, whose matrices lie stacked in one module; a unit is one channel of every expert.

    Args:
        router: the module whose rows go with whole experts.
        interleaved: gate and up rows alternate, as GPT-OSS has them, rather than all gates before all ups.
    """

    router: str = "mlp.gate"
    interleaved: bool = False

    @property
    def module(self) -> str:
        """The module that holds the stacked matrices."""
        return self.container

    @property
    def modules(self) -> tuple[str, ...]:
        """The stacked output matrices and the router."""
        return (self.output, self.router)

    @property
    def key(self) -> str:
        """The name of the stacked output matrices in the state dict."""
        return self.output


@dataclass(frozen=True)
class Mixture(Architecture):
    """A family with experts.

    Args:
        width: the config field of an expert's width.
        shared: the config field of the shared expert's width; ``None`` without one.
        shared_count: the config field that says how many times an expert's width the shared one has, where it has no
            width of its own.
        expert_groups: the config field that counts groups of neighbouring experts of equal size, among which the router
            chooses first.
        group_least: experts that every such group must keep.
        sparse: see :data:`Sparse`; every layer where not given.
    """

    width: str = "moe_intermediate_size"
    shared: str | None = None
    shared_count: str | None = None
    expert_groups: str | None = None
    group_least: int = 1
    sparse: Sparse = lambda _config, _index: True

    @property
    def experts(self) -> Experts:
        """The structure of the experts."""
        return next(structure for structure in self.structures if isinstance(structure, Experts))

    def read(self, config: Any, index: int = 0) -> dict[str, int]:
        """The sizes of a layer from its config."""
        sizes = super().read(config, index)
        if not self.sparse(config, index):
            return sizes
        sizes[CHANNELS] = int(getattr(config, self.width))
        sizes[EXPERTS] = int(getattr(config, self.fields.get(EXPERTS, EXPERTS)))
        if self.shared is not None:
            sizes[SHARED] = int(getattr(config, self.shared))
        if self.shared_count is not None:
            sizes[SHARED] = sizes[CHANNELS] * int(getattr(config, self.shared_count))
        return sizes

    def write(self, sizes: Sizes) -> dict[str, int]:
        """The config fields that say these sizes."""
        if EXPERTS not in sizes:
            return super().write(sizes)
        rest = {name: value for name, value in sizes.items() if name not in (CHANNELS, SHARED)}
        shared = {self.shared: sizes[SHARED]} if self.shared is not None else {}
        return {**super().write(rest), self.width: sizes[CHANNELS], **shared}

    def groups_of_experts(self, config: Any) -> int:
        """In how many groups of equal size the experts of a layer fall."""
        return int((self.expert_groups and getattr(config, self.expert_groups)) or 1)

    def least_experts(self, config: Any) -> int:
        """How few experts a layer can have: as many as a token goes to, and what the router's groups need."""
        groups = self.groups_of_experts(config)
        per_group = self.group_least
        if groups > 1:  # a token's experts lie in so many groups
            per_group = max(per_group, -(-config.num_experts_per_tok // int(config.topk_group)))
        return max(groups * per_group, -(-config.num_experts_per_tok // groups) * groups)


def experts(
    module: str = "mlp.experts", router: str = "mlp.gate", transposed: bool = False, interleaved: bool = False
) -> Experts:
    """Experts as transformers stacks them."""
    return Experts(
        "ffn",
        f"{module}.down_proj",
        (),
        (CHANNELS,),
        transposed=transposed,
        router=router,
        interleaved=interleaved,
    )


def shared_expert(module: str) -> Structure:
    """An expert that every token goes to."""
    return Structure("shared", f"{module}.down_proj", (f"{module}.gate_proj", f"{module}.up_proj"), (SHARED,))


def latent_heads(queries: str) -> Structure:
    """Multi-head latent attention: keys and values of all heads are made from one latent vector, which stays as it is.

    Every head has rows of its own in the matrices that make queries, and keys and values, from their latents; the
    rotary part of the key is one for all heads.

    Args:
        queries: the module that makes the queries.
    """
    return Structure("kv", "self_attn.o_proj", (f"self_attn.{queries}", "self_attn.kv_b_proj"), (KV_HEADS, HEADS))


_QKV = in_module("self_attn", "q_proj", "k_proj", "v_proj")
_HEADS = grouped("self_attn.o_proj", *_QKV)
_DENSE = ffn("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
_SINKS = grouped("self_attn.o_proj", *_QKV, along=("self_attn.sinks",))
_LOCAL = {EXPERTS: "num_local_experts"}

_MIXTRAL = Mixture((*_HEADS, experts()), width="intermediate_size", fields=_LOCAL)
_NORM_OVER_ALL_HEADS = "one norm spans the queries of all heads, so no head is independent of the others"


def _stepped(config: Any, index: int) -> bool:
    dense = index in (config.mlp_only_layers or ())
    return not dense and config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0


def _after_dense(config: Any, index: int) -> bool:
    return index >= config.first_k_dense_replace


def _deepseek(config: Any) -> Mixture:
    queries = "q_proj" if config.q_lora_rank is None else "q_b_proj"
    v3 = config.model_type == "deepseek_v3"
    grouped_router = v3 or config.topk_method == "group_limited_greedy"
    return Mixture(
        (latent_heads(queries), _DENSE, experts(), shared_expert("mlp.shared_experts")),
        fields={EXPERTS: "n_routed_experts"},
        shared_count="n_shared_experts",
        expert_groups="n_group" if grouped_router else None,
        group_least=2 if v3 else 1,  # the score of a group is the sum of its two best experts
        sparse=_after_dense,
    )


MIXTURES: dict[str, Entry] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": Mixture(
        (*_HEADS, _DENSE, shared_expert("mlp.shared_expert"), experts()),
        shared="shared_expert_intermediate_size",
        sparse=_stepped,
    ),
    "qwen3_moe": Mixture((*_HEADS, _DENSE, experts()), sparse=_stepped),
    "olmoe": Mixture((experts(),), width="intermediate_size", refused={"heads": _NORM_OVER_ALL_HEADS}),
    "granitemoe": Mixture(
        (*_HEADS, experts("block_sparse_moe.experts", "block_sparse_moe.router")),
        width="intermediate_size",
        fields=_LOCAL,
    ),
    "phimoe": Mixture((*_HEADS, experts(router="mlp.router")), width="intermediate_size", fields=_LOCAL),
    "gpt_oss": Mixture(
        (*_SINKS, experts(router="mlp.router", transposed=True, interleaved=True)),
        width="intermediate_size",
        fields=_LOCAL,
    ),
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}
