"""Mixtures of experts: who sees which token, which experts stay, and how the others make up for the rest.

The output of a mixture is ``y = sum_e p_e W_e h_e`` over the experts ``e`` that a token is routed to, ``p_e`` the
router's weight and ``h_e`` the inputs of the expert's output matrix ``W_e``. What pruning channels changes is
``p_e (W_e h_e - W'_e h_e,K)``, so the layer-wise problem of one expert is that of any output matrix with the inputs
``p_e h_e``: its Hessian is ``H_e = E[p_e^2 h_e h_e^T]`` over the tokens routed to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimgpt.solver.hessian import damp
from slimgpt.solver.top_k import top_per_group

CHUNK = 2048
"""Tokens whose outputs of every expert are held at once."""


class Routing:
    """Tokens of each expert and their weights, from the router's output.

    Args:
        index: ``(tokens, k)`` long, the experts of every token.
        weights: ``(tokens, k)``, what their outputs are multiplied by.
        experts: how many there are.

    Attributes:
        counts: tokens that each expert sees.
    """

    def __init__(self, index: Tensor, weights: Tensor, experts: int):
        flat = index.flatten()
        order = flat.argsort(stable=True)
        self.counts: list[int] = torch.bincount(flat, minlength=experts).tolist()
        self._rows = (order // index.shape[1]).split(self.counts)
        self._slots = (order % index.shape[1]).split(self.counts)
        self._weights = weights.flatten()[order].split(self.counts)

    def rows(self, expert: int) -> Tensor:
        """The tokens that an expert sees, ascending, ``(count,)`` long."""
        return self._rows[expert]

    def slots(self, expert: int) -> Tensor:
        """Positions of the expert among the ``k`` choices of those tokens, ``(count,)`` long."""
        return self._slots[expert]

    def weights(self, expert: int) -> Tensor:
        """Factors of its output, ``(count, 1)``."""
        return self._weights[expert].unsqueeze(1)


class OutputGram:
    """Inner products of what the experts contribute, ``C_ef = sum_tokens (p_e o_e) . (p_f o_f)``, and with a target.

    Args:
        experts: how many there are.
        device: where the sums live.
        dtype: their type.
        norms: whether the norms are summed that :meth:`saliency` needs.

    Attributes:
        C: ``(experts, experts)``; its diagonal is the energy that each expert puts into the output.
        norms: ``(experts,)``, ``sum_tokens || p_e o_e ||``; ``None`` if not asked for.
        counts: ``(experts,)``, tokens that each expert saw; ``None`` likewise.
        c: ``(experts,)``, inner products with the target.
        total: ``sum_tokens || target ||^2``.
    """

    def __init__(
        self,
        experts: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        norms: bool = False,
    ):
        self.C = torch.zeros(experts, experts, device=device, dtype=dtype)
        self.c = torch.zeros(experts, device=device, dtype=dtype)
        self.total = torch.zeros((), device=device, dtype=dtype)
        self.norms = torch.zeros_like(self.c) if norms else None
        self.counts = torch.zeros_like(self.c) if norms else None

    def add(self, index: Tensor, outputs: Tensor, target: Tensor) -> None:
        """Add tokens.

        Args:
            index: ``(tokens, k)`` long, the experts of every token.
            outputs: ``(tokens, k, hidden)``, what each contributes.
            target: ``(tokens, hidden)``, what their sum should be.
        """
        if outputs.dtype in (torch.bfloat16, torch.float16):
            outputs, target = outputs.float(), target.float()
        experts = len(self.c)
        pairs = index.unsqueeze(2) * experts + index.unsqueeze(1)  # (tokens, k, k)
        self.C.view(-1).index_add_(0, pairs.flatten(), (outputs @ outputs.mT).flatten().to(self.C.dtype))
        with_target = (outputs @ target.unsqueeze(2)).squeeze(2)  # (tokens, k)
        self.c.index_add_(0, index.flatten(), with_target.flatten().to(self.c.dtype))
        self.total += target.square().sum().to(self.total.dtype)
        if self.norms is not None and self.counts is not None:
            self.norms.index_add_(0, index.flatten(), outputs.norm(dim=-1).flatten().to(self.norms.dtype))
            self.counts += torch.bincount(index.flatten(), minlength=experts)

    @property
    def sums_of_outputs(self) -> list[Tensor]:
        """The sums that do not depend on the target, to be added over processes."""
        return [tensor for tensor in (self.C, self.norms, self.counts) if tensor is not None]

    def saliency(self) -> Tensor:
        """REAP's saliency of every expert (arXiv 2510.13999): the mean over the tokens routed to it of the router's
        weight times the norm of its output, ``(experts,)``; 0 for one that saw nothing.

        Raises:
            ValueError: no norms were summed.
        """
        if self.norms is None or self.counts is None:
            raise ValueError("the saliency needs norms, which were not summed: OutputGram(..., norms=True)")
        return self.norms / self.counts.clamp_min(1)

    def scales(self, damping: float) -> Tensor:
        """The factor of every expert's output that brings the sum closest to the target, ``(experts,)``.

        ``argmin sum_tokens || target - sum_e a_e p_e o_e ||^2 + damping * mean(diag C) * || a - 1 ||^2``: with little
        to go by, factors stay near 1; an expert that saw nothing keeps 1.

        Raises:
            torch.linalg.LinAlgError: the damped ``C`` is not positive definite.
        """
        H = damp(self.C.clone(), damping)
        pull = H.diagonal() - self.C.diagonal()
        L = torch.linalg.cholesky(H)
        return torch.cholesky_solve((self.c + pull).unsqueeze(1), L).squeeze(1)

    def error(self, scales: Tensor) -> float:
        """``sum || target - sum_e a_e p_e o_e ||^2 / sum || target ||^2``; 0 where the target is zero."""
        lost = self.total - 2 * (scales @ self.c) + scales @ self.C @ scales
        return max(float(lost / self.total), 0.0) if float(self.total) > 0 else 0.0


def expert_scores(method: str, gram: OutputGram, norms: Tensor, generator: torch.Generator) -> Tensor:
    """Importance of each expert, ``(experts,)`` on the CPU.

    Args:
        method: ``random`` draws, ``magnitude`` goes by the output matrices, ``reap`` by :meth:`OutputGram.saliency`;
            every other method by the energy that the expert puts into the output, ``E[p_e^2 || W_e h_e ||^2]``.
        norms: ``(experts,)``, ``|| W_e ||_F^2``.
    """
    if method == "random":
        return torch.rand(len(norms), generator=generator)
    if method == "magnitude":
        return norms
    return (gram.saliency() if method == "reap" else gram.C.diagonal()).cpu()


def select_experts(scores: Tensor, keep: int, groups: int = 1) -> Tensor:
    """The experts with the highest scores, the same number from every group of neighbours.

    Args:
        scores: ``(experts,)``.
        keep: how many stay.
        groups: routers that first choose among groups of neighbouring experts need groups of equal size.

    Returns:
        The kept experts, sorted, ``(keep,)`` long.

    Raises:
        ValueError: ``groups`` divides neither ``keep`` nor the number of experts, or there are fewer than ``keep``.
    """
    experts = len(scores)
    if experts % groups or keep % groups or not 0 < keep <= experts:
        raise ValueError(f"cannot keep {keep} of {experts} experts in {groups} groups")
    return top_per_group(scores.view(groups, -1), keep // groups)


def contributions(
    routing: Routing, tokens: Tensor, k: int, hidden: int, compute: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Contribution of every expert to every token's output, ``(tokens, k, hidden)``, the router's weight included.

    Args:
        tokens: ``(tokens, n)``, what the experts read.
        compute: an expert's number and its tokens to its output ``(count, hidden)``.
    """
    outputs = tokens.new_zeros(len(tokens), k, hidden)
    for expert, count in enumerate(routing.counts):
        if count:
            rows = routing.rows(expert)
            outputs[rows, routing.slots(expert)] = compute(expert, tokens[rows]) * routing.weights(expert)
    return outputs


def needs_fallback(count: int, channels: int) -> bool:
    """Whether an expert saw too few tokens for a Hessian of its own: fewer than it has channels."""
    return count < channels
