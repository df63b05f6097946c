"""The pieces of mixtures of experts: what their table (:mod:`slimgpt.models.families.mixtures`) is made of.

In a layer of experts ``intermediate_size`` is the width of every expert, ``num_experts`` counts them and
``shared_expert_intermediate_size`` is the width of the expert that every token goes to, whatever the config calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slimgpt.errors import ModelError
from slimgpt.models.architecture import CHANNELS, Architecture, Fused, Sizes, Structure

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
        per_expert: further parameters and buffers with one number per expert, where the family has them, such as the
            correction of the router's scores.
        interleaved: gate and up rows alternate, as GPT-OSS has them, rather than all gates before all ups.
        scaled_inputs: the router's weights multiply what the experts read, as in Llama 4: every expert is called with
            all tokens, those of the others being zero. One expert per token.
    """

    router: str = "mlp.gate"
    per_expert: tuple[str, ...] = ()
    interleaved: bool = False
    scaled_inputs: bool = False

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
        shared_count: how many times an expert's width the shared one has, where it has no width of its own: a number,
            or the config field that says it.
        expert_groups: the config field that counts groups of neighbouring experts of equal size, among which the router
            chooses first.
        group_least: experts that every such group must keep.
        per_token: the config field of the experts that a token goes to.
        matrices: the matrices of an expert: gate, up and down, or two without a gate.
        expert_hidden: the config field of the size that experts read and write.
        sparse: see :data:`Sparse`; every layer where not given.
    """

    width: str = "moe_intermediate_size"
    shared: str | None = None
    shared_count: str | int | None = None
    expert_groups: str | None = None
    group_least: int = 1
    per_token: str = "num_experts_per_tok"
    matrices: int = 3
    expert_hidden: str = "hidden_size"
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
        sizes[CHANNELS] = _number(config, self.width)
        sizes[EXPERTS] = _number(config, self.fields.get(EXPERTS, EXPERTS))
        if self.shared is not None:
            sizes[SHARED] = _number(config, self.shared)
        if self.shared_count is not None:
            count = self.shared_count if isinstance(self.shared_count, int) else _number(config, self.shared_count)
            sizes[SHARED] = sizes[CHANNELS] * count
        return sizes

    def write(self, sizes: Sizes) -> dict[str, Any]:
        """The config fields that say these sizes."""
        if EXPERTS not in sizes:
            return super().write(sizes)
        rest = {name: value for name, value in sizes.items() if name not in (CHANNELS, SHARED)}
        shared = {self.shared: sizes[SHARED]} if self.shared is not None else {}
        return {**super().write(rest), self.width: sizes[CHANNELS], **shared}

    def groups_of_experts(self, config: Any) -> int:
        """Number of groups of equal size among the experts of a layer."""
        return int((self.expert_groups and getattr(config, self.expert_groups)) or 1)

    def least_experts(self, config: Any) -> int:
        """Smallest number of experts of a layer: as many as a token goes to, and what the router's groups need."""
        groups, active = self.groups_of_experts(config), self.active_experts(config)
        per_group = self.group_least
        if groups > 1:  # a token's experts lie in so many groups
            per_group = max(per_group, -(-active // int(config.topk_group)))
        return max(groups * per_group, -(-active // groups) * groups)

    def active_experts(self, config: Any) -> int:
        """Number of experts that a token goes to."""
        return _number(config, self.per_token)

    def expert_parameters(self, config: Any, width: int) -> int:
        """The parameters of an expert's matrices, each of which multiplies a token once."""
        return self.matrices * int(getattr(config, self.expert_hidden)) * width


def _number(config: Any, name: str) -> int:
    """A field of a config; of a list with one number for each layer, which are equal, the largest."""
    value = getattr(config, name, None)
    if isinstance(value, (list, tuple)) and value:
        value = max(value)
    if not isinstance(value, int):
        raise ModelError(
            f"{name} in the config of the '{config.model_type}' is {value!r:.60}, where layers of experts need a whole "
            "number; correct config.json, or fetch it again"
        )
    return value


def experts(module: str = "mlp.experts", router: str = "mlp.gate", *per_expert: str, **layout: Any) -> Experts:
    """Experts as transformers stacks them.

    Args:
        per_expert: see :class:`Experts`.
        layout: ``transposed``, ``interleaved`` and ``scaled_inputs``.
    """
    return Experts("ffn", f"{module}.down_proj", (), (CHANNELS,), router=router, per_expert=per_expert, **layout)


def shared_expert(output: str, *inputs: str | Fused) -> Structure:
    """An expert that every token goes to, from its matrices."""
    return Structure("shared", output, inputs, (SHARED,))
