"""The loop: layer by layer, attention before FFN, each on the stream of the layers already pruned.

Every matrix is multiplied once per token. Attention runs once and the inputs of its output matrix are kept; the
pruned matrix turns them into the attention's result. The gate and up matrices run once on that, and their output
meets the pruned down matrix. So a layer costs less than one dense forward pass, plus two Gram matrices and the
solver. A layer that was pruned by an earlier run goes through the same code with its matrices given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.models.architectures import Sizes, Structure
from slimgpt.models.heterogeneous import architecture_of, decoder_layers, layer_sizes, rebuild_layer
from slimgpt.models.mixtures import Experts, Mixture
from slimgpt.models.shape import count
from slimgpt.models.slicing import State, output_matrix, slice_state, unit_rows
from slimgpt.planning.plan import Plan
from slimgpt.pruning.capture import Part, Stream, arguments_of, capture, run_with
from slimgpt.pruning.memory import (
    DEVICE,
    FILE,
    HOST,
    RECOMPUTE,
    RESERVE,
    Placement,
    Shelf,
    free_bytes,
    mapped,
    trim,
    used_bytes,
)
from slimgpt.pruning.mixture import MixtureWork
from slimgpt.pruning.ranks import Ranks
from slimgpt.pruning.report import ExpertsReport, LayerReport
from slimgpt.solver import CRITERIA, Gram, damp, reconstruct, relative_error

EXACT_SIZE = 4096
"""Up to this many columns the solver runs in fp64: it costs little there, and fp32 loses digits to damping 0."""


def solver_dtype(n: int, device: torch.device) -> torch.dtype:
    """The type of the Hessian and the solver for ``n`` columns."""
    return torch.float64 if n <= EXACT_SIZE and device.type != "mps" else torch.float32


@dataclass(frozen=True)
class Finished:
    """A layer that is pruned: what was decided, and the state dict of the narrower layer on the CPU."""

    report: LayerReport
    state: State


Chooser = Callable[[Tensor, Tensor], tuple[Tensor, int]]
"""From ``W`` and its damped Hessian to the kept units and the number of units."""

Finder = Callable[[int], Finished | None]
"""Gives a layer that an earlier run has finished."""

Choice = Callable[[int, str], Tensor]
"""Gives the kept units of a layer's ``heads`` or ``channels``, sorted, where something else has chosen them."""


@dataclass(frozen=True)
class Run:
    """How and where the loop runs.

    Args:
        device: where layers run and are solved, one at a time.
        placement: where activations are kept.
        dtype: of the forward passes; ``None`` runs the layers as they are stored.
        ranks: the processes that share the windows.
        scratch: a folder for activations that memory has no room for.
        finished: the layers that are done.
        choice: takes the criterion's place; what it chooses is repaired as the settings say.
    """

    device: torch.device
    placement: Placement
    dtype: torch.dtype | None = None
    ranks: Ranks = field(default_factory=Ranks)
    scratch: Path | None = None
    finished: Finder = lambda _: None
    choice: Choice | None = None

    def alone(self, dtype: torch.dtype | None) -> Run:
        """The same in one process and without a journal, for work beside the loop.

        Args:
            dtype: of its forward passes.
        """
        return Run(self.device, self.placement, dtype, scratch=self.scratch)


@torch.no_grad()
def prune_layers(
    model: PreTrainedModel,
    take: Callable[[int], nn.Module],
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    run: Run,
) -> Iterator[Finished]:
    """Prune layer after layer; the model itself is not changed.

    Args:
        model: what is around the layers (its own layers may have no storage).
        take: gives the dense layer of an index, on any device.
        windows: ``(num_samples, seq_len)`` long, the calibration tokens of this process.
        plan: the widths to reach.

    Raises:
        NumericalError: NaN or infinity in activations, or a Hessian that is not positive definite.
    """
    architecture = architecture_of(model.config, model)
    structures = architecture.chosen(plan.head_unit)
    layers = decoder_layers(model)
    hidden = Shelf(run.placement.stream, run.device, run.scratch)
    stream = capture(model, layers, windows, config.batch_size, hidden, run.dtype)
    for index, (sizes, target) in enumerate(zip(layer_sizes(model.config), plan.layers, strict=True)):
        dense = take(index)
        work = Layer(index, dense, model.config, config, run)
        # All processes go the same way, though only rank 0 sees the journal.
        earlier = run.finished(index) if run.ranks.main else None
        work.earlier = earlier
        work.replay = bool(run.ranks.agree(int(earlier is not None)))
        work.expert_groups = architecture.groups_of_experts(model.config) if isinstance(architecture, Mixture) else 1
        state = work.prune(structures, sizes, target, stream)
        if earlier is not None:
            yield earlier
            continue
        report = LayerReport(
            index,
            dict(target),
            work.kept,
            work.error,
            count(dense),
            sum(tensor.numel() for name, tensor in state.items() if name in work.parameters),
            work.seconds,
            work.experts,
        )
        finished = Finished(report, {name: tensor.to("cpu") for name, tensor in state.items()})
        del work, dense, state  # the next layer is not to be worked on beside this one
        yield finished
        del finished
        trim()


def as_run(tensor: Tensor, run: Run) -> Tensor:
    """A tensor where and as the forward passes need it."""
    return tensor.to(run.device, run.dtype if run.dtype is not None and tensor.is_floating_point() else tensor.dtype)


def running_layer(layer: nn.Module, model_config: Any, index: int, run: Run, sizes: Sizes | None = None) -> nn.Module:
    """A layer on the device and in the type of the forward passes.

    Args:
        sizes: its widths; by default what the config says.
    """
    running = {name: as_run(tensor, run) for name, tensor in layer.state_dict().items()}
    return rebuild_layer(layer, model_config, index, running, sizes).to(run.device)


def matrix_of(layer: nn.Module, structure: Structure) -> tuple[Tensor, Tensor | None]:
    """The output matrix of a structure, ``(out, n)``, and its bias."""
    linear = layer.get_submodule(structure.output)
    W = cast(Tensor, linear.weight).detach()
    return W.T if structure.transposed else W, cast(Tensor | None, linear.bias)


def check_output(index: int, hidden: Tensor) -> None:
    """Refuse hidden states behind a layer that are not finite.

    Raises:
        NumericalError: they hold NaN or infinity; the layer is named.
    """
    if not bool(torch.isfinite(hidden).all()):
        raise NumericalError(f"layer {index}: its output holds NaN or infinity on the calibration text")


def gram_for(n: int, run: Run, name: str = "gram") -> Gram:
    """A sum to be; in a file where memory is short, and for wide layers on a CPU, where it is read only a few times and
    the system can write it out meanwhile.

    Args:
        name: of the file, for several at once.
    """
    dtype = solver_dtype(n, run.device)
    wide = n > EXACT_SIZE and run.device.type == "cpu"
    if run.scratch is None or not (wide or run.placement.gram == FILE):
        return Gram(n, run.device, dtype)
    return Gram(n, dtype=dtype, storage=mapped(run.scratch / f"{name}-{run.ranks.rank}", (n, n), dtype))


def shelf_for(run: Run, size: int) -> Shelf:
    """A shelf for ``size`` bytes: where the stream is, or farther off if they take more than a quarter of the room.

    What grows with the depth of the model is never in the memory of a run from folder to folder on a CPU. Host memory
    has its limits, too: all matrices in fp32, with what Adam remembers of them, are several times the model.
    """
    place, on_cpu = run.placement.stream, run.device.type == "cpu"
    room = run.placement.budget - used_bytes(run.device)
    if place == DEVICE and (size > room // 4 or (on_cpu and run.scratch is not None)):
        place = FILE if on_cpu else HOST
    if place == HOST and size > free_bytes(torch.device("cpu")) * RESERVE / 2:
        place = FILE
    return Shelf(place, run.device, run.scratch)


class Layer:
    """One layer while it is pruned; notes what it kept, the errors and the seconds."""

    def __init__(self, index: int, dense: nn.Module, model_config: Any, config: PruneConfig, run: Run):
        self.index, self.config, self.run, self.model_config = index, config, run, model_config
        self.criterion = CRITERIA[config.method]
        self.repair = self.criterion.repair if config.repair is None else config.repair
        # One generator per layer: a run that goes on in the middle draws the same numbers.
        self.generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
        self.earlier: Finished | None = None
        self.replay = False
        self.expert_groups = 1
        self.experts: ExpertsReport | None = None
        self.kept: dict[str, list[int]] = {}
        self.error: dict[str, float] = {}
        self.seconds: dict[str, float] = {"load": 0.0, "forward": 0.0, "hessian": 0.0, "solver": 0.0}
        self.results: dict[str, Shelf] = {}  # what the finished matrices returned, by the place it is given at
        self.rebuild: dict[tuple[str, int], Callable[[Tensor], Any]] = {}  # by place and batch
        self.parameters = {name for name, _ in dense.named_parameters()}
        self.state: State = dense.state_dict()
        with self.timed("load"):
            self.layer = running_layer(dense, model_config, index, run)

    def prune(self, structures: Sequence[Structure], sizes: Sizes, target: Sizes, stream: Stream) -> State:
        """The state dict of the narrower layer in its stored type; the stream is moved on behind the layer."""
        self.stream, self.dense_sizes = stream, dict(sizes)
        structures = [structure for structure in structures if structure.key in self.state]
        if not structures:
            with self.timed("forward"):
                for number in range(len(stream)):
                    self._leave(number)
        for structure in structures:
            last = structure is structures[-1]
            if isinstance(structure, Experts):
                self._prune_experts(structure, sizes, target, last)
                continue
            name = structure.name
            W, bias = matrix_of(self.layer, structure)
            results = cast(Shelf, self.shelf(self.run.placement.stream))
            out = None if last else results
            if self.replay or structure.units(target) == structure.units(sizes):
                columns, W = self._decide(name, structure, W, None, sizes, target)
                with self.timed("forward"):
                    for number in range(len(stream)):
                        self._finish(number, self._inputs(number, structure), columns, W, bias, out)
            else:
                gram, kept = self.gram(W.shape[1]), self.shelf(self.run.placement.kept)
                for number in range(len(stream)):
                    with self.timed("forward"):
                        inputs = self._inputs(number, structure)
                    with self.timed("hessian"):
                        gram.add(inputs)
                    if kept is not None:
                        kept.put(number, inputs)
                    del inputs
                with self.timed("hessian"):
                    self.run.ranks.reduce(gram)
                with self.timed("solver"):
                    columns, W = self._decide(name, structure, W, gram, sizes, target)
                    del gram
                with self.timed("forward"):
                    for number in range(len(stream)):
                        inputs = kept.take(number) if kept is not None else self._inputs(number, structure)
                        self._finish(number, inputs, columns, W, bias, out)
            self.results[self.place] = results
            sizes = structure.shrink(sizes, structure.units(target))
        return self.state

    def _prune_experts(self, experts: Experts, sizes: Sizes, target: Sizes, last: bool) -> None:
        outputs = MixtureWork(self, experts, sizes, self.expert_groups).prune(target)
        for number in range(len(self.stream)):
            self.rebuild[experts.module, number] = lambda tensor: tensor
            if last:
                with self.timed("forward"):
                    self._leave(number, {experts.module: outputs.take(number)})
        if not last:
            self.results[experts.module] = outputs

    def called(self, number: int, module: str) -> tuple[Any, ...]:
        """What a module of the layer is called with on one batch."""
        return arguments_of(self.layer, module, lambda: self._run(number))

    def _inputs(self, number: int, structure: Structure) -> Tensor:
        """The input of the output matrix for one batch, ``(batch, seq_len, n)``."""
        part = cast(Part, self._run(number, until=structure.output))
        self.place = part.place
        self.rebuild[part.place, number] = part.rebuild
        return part.inputs

    def _finish(
        self,
        number: int,
        inputs: Tensor,
        columns: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        results: Shelf | None,
    ) -> None:
        """Multiply one batch by the narrow matrix; keep the result, or, with the last one, let it leave the layer."""
        result = F.linear(inputs if columns is None else inputs[..., columns], W, bias)
        if results is not None:
            results.put(number, result)
            return
        self._leave(number, {self.place: self.rebuild.pop((self.place, number))(result)})

    def _leave(self, number: int, result: dict[str, Any] | None = None) -> None:
        """Let one batch leave the layer."""
        after = self._run(number, result)
        check_output(self.index, after)
        self.stream.hidden.put(number, after)

    def _run(self, number: int, result: dict[str, Any] | None = None, until: str | None = None) -> Any:
        """Run one batch through the layer with the results of the finished matrices given."""
        given = {name: self.rebuild[name, number](shelf.get(number)) for name, shelf in self.results.items()}
        arguments = self.stream.arguments[number][self.index]
        return run_with(self.layer, {**given, **(result or {})}, self.stream.hidden.get(number), arguments, until)

    def shelf(self, place: str) -> Shelf | None:
        return None if place == RECOMPUTE else Shelf(place, self.run.device, self.run.scratch)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a block to a part, with the device's work finished."""
        start = time.perf_counter()
        yield
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        self.seconds[part] += time.perf_counter() - start

    def running(self, tensor: Tensor) -> Tensor:
        """A tensor where and as the forward passes need it."""
        return as_run(tensor, self.run)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type of small sums."""
        return solver_dtype(1, self.run.device)

    def gram(self, n: int) -> Gram:
        """The sum to be; see :func:`gram_for`."""
        return gram_for(n, self.run)

    def _decide(
        self, name: str, structure: Structure, running: Tensor, gram: Gram | None, sizes: Sizes, target: Sizes
    ) -> tuple[Tensor | None, Tensor]:
        """The columns that stay (``None``: all) and the narrow matrix as the forward pass needs it.

        Rank 0 takes both from an earlier run or from the solver, the others from rank 0.
        """
        units, keep = structure.units(sizes), structure.units(target)
        if keep == units:
            self.kept[name], self.error[name] = list(range(units)), 0.0
            return None, running
        stored = output_matrix(self.state, structure)
        out, n = stored.shape
        ranks, device = self.run.ranks, self.run.device
        if not ranks.main:
            kept = torch.empty(keep, dtype=torch.long)
            W_kept = torch.empty(out, n // units * keep, dtype=stored.dtype, device=device)
        elif self.earlier is not None:
            kept = torch.tensor(self.earlier.report.kept[name])
            # Copied: products may differ in the last bit with where in memory their factors begin.
            W_kept = output_matrix(self.earlier.state, structure).to(device, copy=True)
        else:
            assert gram is not None
            choose = self._choice(name, structure, sizes, keep)
            kept, W_kept = self.solve(structure.output, stored.to(device), gram, choose)
            self.error[name] = self.solved[0]
        kept = ranks.broadcast(kept.to(device)).cpu()
        W_kept = ranks.broadcast(W_kept.contiguous())  # the solver leaves it in column order, a file holds rows
        self.kept[name] = kept.tolist()
        self.state = slice_state(self.state, structure, sizes, kept, W_kept)
        return unit_rows(n, units, kept).to(device), W_kept.to(running.dtype)

    def channels(self, keep: int) -> Chooser:
        """The method's choice of so many channels."""
        return lambda W, H: (self.criterion.channels(W, H, keep, self.generator), W.shape[1])

    def _choice(self, name: str, structure: Structure, sizes: Sizes, keep: int) -> Chooser:
        """The units that the caller has chosen, or the method's choice."""
        units, groups, chosen = structure.units(sizes), structure.group_count(sizes), self.run.choice
        if chosen is not None:
            return lambda *_: (chosen(self.index, name), units)
        if name != "heads":
            return self.channels(keep)
        return lambda W, H: (self.criterion.heads(W, H, units, keep, groups, self.generator), units)

    def solve(self, what: str, stored: Tensor, gram: Gram, choose: Chooser) -> tuple[Tensor, Tensor]:
        """The kept units and the repaired matrix ``(out, columns)`` in the stored type.

        Afterwards ``solved`` holds the relative error, and the mean energy of the dense output.
        """
        where = f"layer {self.index}, {what}"
        n = stored.shape[1]
        dtype = solver_dtype(n, stored.device)
        trim()
        H = gram.mean()
        if not bool(torch.isfinite(H.sum())):
            raise NumericalError(f"{where}: its inputs hold NaN or infinity on the calibration text")
        W = stored.to(dtype)
        undamped = H.diagonal().clone()
        chosen = None if self.criterion.damped else choose(W, H)
        damp(H, self.config.damping)
        # With the diagonal that it has now, a column whose input is always zero would cost what its weights say.
        live = W if bool(undamped.all()) else W.masked_fill(undamped == 0, 0.0)
        try:
            kept, units = chosen or choose(live, H)
            del live
            columns = unit_rows(n, units, kept).to(W.device)
            trim()
            G = W @ H
            W_kept = reconstruct(G, H, columns) if self.repair else W[:, columns]
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(
                f"{where}: the Hessian is not positive definite with damping {self.config.damping:g}; "
                "raise --damping (0.01 is usual) or give more calibration tokens"
            ) from error
        G -= W * (H.diagonal() - undamped)
        H.diagonal().copy_(undamped)
        self.solved = (relative_error(W, W_kept, H, columns, G), float((G * W).sum()))
        return kept, W_kept.to(stored.dtype)
