"""Routers of mixtures while they are trained."""

from __future__ import annotations

from torch import Tensor

from slimgpt.models.families.moe import Experts


def of_router(name: str, parameter: Tensor, experts: Experts | None) -> bool:
    """Whether a parameter is the router's matrix, which has a row per expert."""
    router = experts is not None and name.startswith(f"{experts.router}.") and name.endswith(".weight")
    return router and parameter.ndim > 1


def leave_unseen(gradients: dict[str, Tensor], experts: Experts) -> None:
    """Zero, in place, the gradients of a router's rows whose experts saw no token of the step: where the router's
    weights are normalised over the chosen experts they are nothing but rounding, and Adam makes a full step of that."""
    outputs = gradients.get(experts.key)
    for name, gradient in gradients.items():
        if outputs is not None and of_router(name, gradient, experts):
            gradient.masked_fill_(~outputs.flatten(1).any(1, keepdim=True), 0.0)
