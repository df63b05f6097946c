"""The experts of one layer: whole ones removed, then channels inside those that stay.

Experts read the same tokens, so these are kept once for all of them; then one expert after another is run on the
tokens routed to it, solved, and adds its share to the output. Memory holds the Gram matrix and the inputs of one expert
at a time, and every matrix is multiplied once per token that is routed to it. Several processes run as many experts at
a time, on their own tokens, and each solves one of them. Only the removal of whole experts takes two passes more: one
to see what each puts into the output, one to fit those that stay once the router has moved their tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from slimgpt.models.architecture import CHANNELS, Sizes
from slimgpt.models.build import rebuild_layer
from slimgpt.models.expert_tensors import (
    down_matrix,
    expert_output,
    intermediate,
    keep_channels,
    keep_experts,
    returned,
    routed,
    scale_experts,
)
from slimgpt.models.families.moe import EXPERTS, Experts
from slimgpt.pruning.report import ExpertsReport, mask_of, units_of
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.solver import Gram
from slimgpt.solver.experts import (
    CHUNK,
    OutputGram,
    Routing,
    contributions,
    expert_scores,
    needs_fallback,
    select_experts,
)

if TYPE_CHECKING:
    from slimgpt.pruning.layer import LayerPruner


class ExpertsPruner:
    """The experts of a layer while they are pruned.

    Args:
        layer: the layer that is worked on.
        experts: its description.
        sizes: the widths of the layer before.
        groups: in how many groups of equal size the experts must fall.
    """

    def __init__(self, layer: LayerPruner, experts: Experts, sizes: Sizes, groups: int):
        self.work, self.experts, self.sizes, self.groups = layer, experts, dict(sizes), groups
        self.run, self.ranks = layer.run, layer.run.ranks
        self.tokens = cast(
            ActivationStore, layer.store_at(self.run.placement.stream)
        )  # (tokens, hidden) of every batch
        self.routings: list[Routing] = []
        self.kept = torch.arange(sizes[EXPERTS])
        self.scales: list[float] = []

    @property
    def module(self) -> Any:
        """The module that holds the experts, as they run now."""
        return self.work.layer.get_submodule(self.experts.module)

    def prune(self, target: Sizes) -> ActivationStore:
        """Bring the experts to the sizes asked for, and return their outputs, ``(tokens, hidden)`` for every batch."""
        outputs = self._remove(target[EXPERTS]) if target[EXPERTS] < self.sizes[EXPERTS] else None
        if outputs is None:
            with self.work.timed("forward"):
                for number in range(len(self.work.inputs)):
                    self._route(number)
        return self._narrow(target[CHANNELS])

    def returned(self, outputs: Tensor) -> Tensor:
        """The output of the experts' module, from the sum of their outputs ``(tokens, hidden)``."""
        return returned(outputs, self.experts, self.sizes[EXPERTS])

    def _route(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """One batch: tokens ``(tokens, hidden)``, the experts of each and their weights ``(tokens, k)``."""
        arguments = self.work.module_inputs(number, self.experts.module)
        tokens, index, weights = routed(arguments, self.experts, self.sizes[EXPERTS])
        self.tokens.put(number, tokens)
        self.routings[number:] = [Routing(index, weights, self.sizes[EXPERTS])]
        return tokens, index, weights

    def _all_outputs(self, number: int, gram: OutputGram, target: Tensor | None) -> Tensor:
        """Run all experts on one batch; what they add up to, ``(tokens, hidden)``."""
        tokens, index, weights = self._route(number)
        added = []
        for start in range(0, len(tokens), CHUNK):
            part = slice(start, start + CHUNK)
            routing = Routing(index[part], weights[part], self.sizes[EXPERTS])
            outputs = contributions(routing, tokens[part], index.shape[1], tokens.shape[1], self._output)
            added.append(outputs.sum(1))
            gram.add(index[part], outputs, added[-1] if target is None else target[part])
        return torch.cat(added)

    def _output(self, expert: int, tokens: Tensor) -> Tensor:
        return expert_output(self.module, self.experts, expert, tokens)

    def _remove(self, keep: int) -> None:
        """Remove whole experts with their rows of the router, and scale the outputs of those that stay."""
        work, resumed = self.work, self.work.resumed
        experts, batches = self.sizes[EXPERTS], range(len(work.inputs))
        targets = cast(ActivationStore, work.store_at(self.run.placement.stream))
        gram = OutputGram(experts, self.run.device, work.sum_dtype, norms=work.config.method == "reap")
        if not work.replaying:
            with work.timed("forward"):
                for number in batches:
                    targets.put(number, self._all_outputs(number, gram, None))
            for tensor in gram.sums_of_outputs:
                self.ranks.total(tensor)
        with work.timed("solver"):
            if self.ranks.main and resumed is not None:
                kept = torch.tensor(cast(ExpertsReport, resumed.report.experts).kept)
            else:
                down = work.state[self.experts.key]
                norms = torch.stack([matrix.double().square().sum() for matrix in down])
                scores = expert_scores(work.config.method, gram, norms, work.generator)
                kept = select_experts(scores, keep, self.groups)
            self.kept = self.ranks.broadcast(kept.to(self.run.device)).cpu()
            work.state = keep_experts(work.state, self.experts, self.kept)
            self.sizes[EXPERTS] = keep
            self._rebuild(keep_experts(work.layer.state_dict(), self.experts, self.kept))
        gram = OutputGram(keep, self.run.device, work.sum_dtype)
        with work.timed("forward"):
            for number in batches:
                if work.replaying:
                    self._route(number)
                else:
                    self._all_outputs(number, gram, targets.take(number))
        with work.timed("solver"):
            scales = torch.ones(keep, device=self.run.device, dtype=gram.C.dtype)
            if self.ranks.main and resumed is not None:
                scales = scales.new_tensor(cast(ExpertsReport, resumed.report.experts).scales)
            elif not work.replaying:
                for tensor in (gram.C, gram.c, gram.total):
                    self.ranks.total(tensor)
                if work.repair:
                    scales = gram.scales(work.config.damping)
                work.error["experts"] = gram.error(scales)
            scales = self.ranks.broadcast(scales)
            self.scales = scales.tolist()
            if work.repair:
                work.state = scale_experts(work.state, self.experts, scales)
                names = (self.experts.key, f"{self.experts.key}_bias")
                scaled = {name: work.to_compute(work.state[name]) for name in names if name in work.state}
                self._rebuild({**work.layer.state_dict(), **scaled})

    def _rebuild(self, state: dict[str, Tensor]) -> None:
        """Let the layer run with other experts; everything else is as it was before pruning."""
        work = self.work
        sizes = {**work.dense_sizes, EXPERTS: self.sizes[EXPERTS]}
        work.layer = rebuild_layer(work.layer, work.model_config, work.index, state, sizes)

    def _narrow(self, keep: int) -> ActivationStore:
        """Choose channels and repair the output matrix of one expert after another; several processes each solve one
        expert at a time."""
        work, width = self.work, self.sizes[CHANNELS]
        experts = range(self.sizes[EXPERTS])
        outputs = cast(ActivationStore, work.store_at(self.run.placement.stream))
        for number in range(len(work.inputs)):
            outputs.put(number, torch.zeros_like(self.tokens.get(number)))
        counts, square = self._counts()
        chosen: list[Tensor] = []
        matrices: list[Tensor] = []
        self.lost = self.energy = 0.0  # of the experts that this process has solved
        together = self.ranks.world if self._divided else 1
        for first in range(0, len(experts), together):
            for expert, columns, W, held in self._solved(experts[first : first + together], keep, counts, square):
                with work.timed("forward"):
                    for number in range(len(work.inputs)):
                        inputs = held.take(number) if held is not None else self._inputs(number, expert)
                        self._add_output(number, expert, inputs, columns, W, outputs)
                chosen.append(torch.arange(width) if columns is None else columns.cpu())
                matrices.append(self._stored)
        if keep < width:
            work.state = keep_channels(work.state, self.experts, torch.stack(chosen), torch.stack(matrices))
        lost, energy = self.ranks.sums([self.lost, self.energy])
        work.error["channels"] = lost / energy if energy > 0 else 0.0
        work.kept["experts"] = self.kept.tolist()
        fallback = [int(self.kept[e]) for e in experts if keep < width and needs_fallback(counts[e], width)]
        masks = [] if keep == width else [mask_of(channels.tolist(), width) for channels in chosen]
        work.experts = ExpertsReport(self.kept.tolist(), counts, fallback, self.scales, masks)
        return outputs

    @property
    def _divided(self) -> bool:
        """Whether processes solve different experts; draws of a generator come in one order, from one process."""
        return self.work.config.method != "random"

    def _solved(
        self, experts: Sequence[int], keep: int, counts: Sequence[int], square: float
    ) -> Iterator[tuple[int, Tensor | None, Tensor, ActivationStore | None]]:
        """Each expert with what :meth:`_received` returns and, if they were kept, the inputs of its output matrix."""
        work, width = self.work, self.sizes[CHANNELS]
        given = keep == width or work.replaying
        sums: list[tuple[Gram | None, ActivationStore | None]] = []
        for owner, expert in enumerate(experts):
            gram, held = (None, None) if given else (work.gram(width, owner), work.store_at(self.run.placement.kept))
            sums.append((gram, held))
            if gram is None:
                continue
            for number, routing in enumerate(self.routings):
                with work.timed("forward"):
                    inputs = self._inputs(number, expert)
                with work.timed("hessian"):
                    gram.add(inputs * routing.weights(expert).to(inputs))
                if held is not None:
                    held.put(number, inputs)
            with work.timed("hessian"):
                if needs_fallback(counts[expert], width):
                    self._add_sample(gram, expert, square)
                self.ranks.reduce(gram, owner)
        own = None
        for owner, (expert, (gram, _)) in enumerate(zip(experts, sums)):
            if gram is not None and owner == self.ranks.rank:
                with work.timed("solver"):
                    own = self._solve(expert, gram, keep, needs_fallback(counts[expert], width))
                    self.lost += work.solved[0] * work.solved[1] * counts[expert]
                    self.energy += work.solved[1] * counts[expert]
        held_inputs = [held for _, held in sums]
        del sums
        for owner, (expert, held) in enumerate(zip(experts, held_inputs)):
            with work.timed("solver"):
                columns, W = self._received(expert, own, keep, 0 if given else owner)
            yield expert, columns, W, held

    def _counts(self) -> tuple[list[int], float]:
        """The tokens that each expert sees in all processes, and the mean square of the router's weights."""
        device, experts = self.run.device, range(self.sizes[EXPERTS])
        counts = torch.tensor([routing.counts for routing in self.routings], device=device).sum(0)
        squares = sum(r.weights(e).double().square().sum().item() for r in self.routings for e in experts)
        summed = torch.tensor([squares], device=device, dtype=self.work.sum_dtype)
        self.ranks.total(counts)
        self.ranks.total(summed)
        return counts.tolist(), float(summed) / max(int(counts.sum()), 1)

    def _inputs(self, number: int, expert: int) -> Tensor:
        """The inputs of an expert's output matrix in one batch, ``(count, width)``."""
        tokens = self.tokens.rows(number, self.routings[number].rows(expert))
        return intermediate(self.module, self.experts, expert, tokens)

    def _add_output(
        self, number: int, expert: int, inputs: Tensor, columns: Tensor | None, W: Tensor, outputs: ActivationStore
    ) -> None:
        """Multiply one batch by an expert's narrow matrix and add it to the output."""
        routing = self.routings[number]
        if not routing.counts[expert]:
            return
        biases = getattr(self.module, "down_proj_bias", None)
        bias = None if biases is None else biases[expert]
        result = F.linear(inputs if columns is None else inputs[:, columns], W, bias) * routing.weights(expert)
        outputs.add_rows(number, routing.rows(expert), result)

    def _add_sample(self, gram: Gram, expert: int, square: float) -> None:
        """Add tokens of the whole layer, evenly spaced, to what an expert saw itself: twice as many as it has channels.

        They count as the average token does, whatever the router thinks of them.
        """
        sample = -(-2 * self.sizes[CHANNELS] // (len(self.routings) * self.ranks.world))
        for number in range(len(self.routings)):
            available = self.tokens.length(number)
            rows = torch.linspace(0, available - 1, min(sample, available), device=self.run.device).long()
            inputs = intermediate(self.module, self.experts, expert, self.tokens.rows(number, rows))
            gram.add(inputs * square**0.5)

    def _solve(self, expert: int, gram: Gram, keep: int, sparse: bool) -> tuple[Tensor, Tensor]:
        """The channels of an expert that stay, and its repaired matrix."""
        stored, _ = down_matrix(self.work.state, self.experts, expert)
        where = f"{self.experts.module}, expert {int(self.kept[expert])}"
        seen = " and tokens of the whole layer" if sparse else ""
        matrix = f"{where} ({gram.count} tokens{seen})"
        return self.work.solve(matrix, stored.to(self.run.device), gram, self.work.channels(keep))

    def _received(
        self, expert: int, solved: tuple[Tensor, Tensor] | None, keep: int, owner: int
    ) -> tuple[Tensor | None, Tensor]:
        """The columns of an expert that stay (``None``: all) and the matrix as the forward pass needs it.

        The first process takes both from an earlier run, or the owner from the solver; the others get them from there.

        Args:
            solved: of the expert that this process owns.
        """
        work, device = self.work, self.run.device
        stored, _ = down_matrix(work.state, self.experts, expert)
        out, width = stored.shape
        if keep == width:
            self._stored = stored
            return None, work.to_compute(stored)
        if self.ranks.rank != owner:
            kept = torch.empty(keep, dtype=torch.long)
            W = torch.empty(out, keep, dtype=stored.dtype, device=device)
        elif work.resumed is not None:
            kept = torch.tensor(units_of(cast(ExpertsReport, work.resumed.report.experts).channels[expert]))
            W = down_matrix(work.resumed.state, self.experts, expert)[0].to(device, copy=True).contiguous()
        else:
            assert solved is not None
            kept, W = solved
        kept = self.ranks.broadcast(kept.to(device), owner)
        W = self.ranks.broadcast(W.contiguous(), owner)  # the solver leaves it in column order, a file holds rows
        self._stored = W.cpu()
        return kept, work.to_compute(W)
