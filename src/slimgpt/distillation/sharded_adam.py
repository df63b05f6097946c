"""Adam for a training whose processes share the work: ZeRO stage 1 (arXiv 1910.02054), layer by layer.

A step moves a matrix by a share of its own root mean square, as Adafactor does (arXiv 1804.04235, section 8), so one
rate serves models whose weights differ in scale. Of stacked experts every one has a root mean square of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slimgpt.layerwise.context import ExecutionContext, activation_store_for
from slimgpt.models.slicing import State
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import DEVICE
from slimgpt.runtime.row_shards import RowShards

BETAS = (0.9, 0.95)
"""Adam's memory of the mean and of the square of the gradient."""


class ShardedAdam:
    """Parameters in fp32, whole in every process, and Adam's moments of the rows that this process owns.

    Args:
        run: the processes, and the memory.
        count: numbers in all parameters.
    """

    def __init__(self, run: ExecutionContext, count: int):
        self.device, self.ranks, self.shards = run.device, run.ranks, RowShards(run.ranks)
        share = -(-count // run.ranks.world)
        self.weights, self.means, self.squares = (
            activation_store_for(run, size) for size in (4 * count, 2 * share, 2 * share)
        )
        self.scales: list[float | Tensor] = []
        self.steps = 0
        self.rate = 0.0
        # The same for a GPU that replays a step: the length of the step, and the correction of the squares.
        self.on_device = torch.zeros(2, device=self.device) if self.device.type == "cuda" else None

    def add(self, parameter: Tensor, share: float) -> int:
        """Copy a parameter in: single steps are below the resolution of 16 bits. Returns its number.

        Args:
            share: of the rate.
        """
        weight = parameter.detach().to(self.device, torch.float32, copy=True)
        self.weights.put(len(self.scales), weight)
        self.scales.append(_step_scale(weight, share))
        return len(self.scales) - 1

    def start_sum(self, numbers: Sequence[int], gradients: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to sum the gradients of some parameters over processes; what is returned waits, and gives those of the
        rows that this process owns.

        Args:
            gradients: in fp32; none at all stand for zeros.
        """
        return self.shards.start_sum(gradients or [torch.zeros_like(self.weights.get(number)) for number in numbers])

    @property
    def place(self) -> str:
        """The place of weights and moments: the device only if all of them are there."""
        places = {store.place for store in (self.weights, self.means, self.squares)} - {DEVICE}
        return next(iter(places), DEVICE)

    def begin_step(self, rate: float) -> None:
        """Set the learning rate of the next step of all parameters."""
        self.rate = rate
        if self.on_device is not None:
            count = self.steps + 1
            self.on_device[0].fill_(rate / (1 - BETAS[0] ** count))
            self.on_device[1].fill_(1 - BETAS[1] ** count)

    def step(self, numbers: Sequence[int], gradients: Sequence[Tensor]) -> None:
        """One step for some parameters, which are whole in every process afterwards.

        Args:
            gradients: of the rows that this process owns.

        The learning rate is that of :meth:`begin_step`.
        """
        for number, gradient in zip(numbers, gradients, strict=True):
            weight = self.weights.get(number)
            self._step(number, self.shards.own(weight), gradient)
            self.weights.put(number, weight)
        if self.ranks.world > 1:
            weights = [self.weights.get(number) for number in numbers]
            self.shards.share(weights)
            for number, weight in zip(numbers, weights):
                self.weights.put(number, weight)

    def _step(self, number: int, weight: Tensor, gradient: Tensor) -> None:
        """One step for rows of a parameter, in place; so are the moments, which a GPU may find again when it replays
        this."""
        if number not in self.means:
            for store in (self.means, self.squares):
                store.put(number, torch.zeros_like(weight, dtype=torch.bfloat16))
        mean, square = self.means.get(number).float(), self.squares.get(number).float()
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        count = self.steps + 1
        correction = 1 - BETAS[1] ** count if self.on_device is None else self.on_device[1]
        spread = (square / correction).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
        scale = self.scales[number]
        moved, factor = (mean * self.shards.own(scale), 1.0) if isinstance(scale, Tensor) else (mean, scale)
        if self.on_device is None:
            weight.addcdiv_(moved, spread, value=-self.rate * factor / (1 - BETAS[0] ** count))
        else:
            weight.sub_((moved / spread).mul_(self.on_device[0] * factor))
        self.means.update(number, mean)
        self.squares.update(number, square)

    def state(self) -> State:
        """Parameters and moments by number, whole in the first process; the same for any number of processes."""
        tensors = {f"parameter.{number}": weight for number, weight in self.weights.stored().items()}
        for kind, store in (("mean", self.means), ("square", self.squares)):
            for number, own in store.stored().items():
                tensors[f"{kind}.{number}"] = own if self.ranks.world == 1 else self._whole(store, number)
        return tensors

    def _whole(self, store: ActivationStore, number: int) -> Tensor:
        """All rows of a moment in the first process, on the CPU."""
        own = store.get(number)
        if not self.ranks.main:
            self.ranks.gather_rows(own)
            return own
        whole = own.new_empty(self.weights.get(number).shape)
        self.shards.own(whole).copy_(own)
        self.ranks.gather_rows(whole)
        return whole.cpu()

    def restore(self, state: State, steps: int) -> None:
        """Go on from a :meth:`state`; only the first process's is read.

        Args:
            steps: number of steps that it has behind it.
        """
        self.steps = steps
        for number in range(len(self.scales)):
            weight = self.weights.get(number)
            self.weights.put(number, self._received(state, f"parameter.{number}", weight))
            for kind, store in (("mean", self.means), ("square", self.squares)):
                whole = self._received(state, f"{kind}.{number}", weight.bfloat16())
                store.put(number, self.shards.own(whole) if self.ranks.world == 1 else self.shards.own(whole).clone())

    def _received(self, state: State, name: str, like: Tensor) -> Tensor:
        """The first process's tensor of a name, on the device."""
        held = state[name].to(self.device, copy=True) if self.ranks.main else torch.empty_like(like)
        return self.ranks.broadcast(held)


def _step_scale(weight: Tensor, share: float) -> float | Tensor:
    """Factor of a parameter's step: its share of the rate times its root mean square, for every matrix of a stack its
    own, ``(experts, 1, 1)``."""
    if weight.ndim < 3:
        return share * float(weight.square().mean().sqrt())
    return share * weight.square().mean((-2, -1), keepdim=True).sqrt()
