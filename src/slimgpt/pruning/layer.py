"""One decoder layer while it is pruned: Gram matrices, selection, repair, and the forward passes around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimgpt.config import PruneConfig
from slimgpt.errors import NumericalError
from slimgpt.layerwise.capture import LayerInputs
from slimgpt.layerwise.context import ExecutionContext, check_finite_output, running_layer, to_compute
from slimgpt.layerwise.partial_forward import PartialForward, arguments_of, run_with
from slimgpt.models.architecture import Sizes, Structure
from slimgpt.models.lookup import layer_sizes
from slimgpt.models.modeling_slim import skip_attention
from slimgpt.models.slicing import State, output_matrix, slice_state, unit_rows
from slimgpt.pruning.report import ExpertsReport, PrunedLayer
from slimgpt.runtime.activation_store import ActivationStore, mapped
from slimgpt.runtime.devices import synchronized_time
from slimgpt.runtime.memory import FILE, RECOMPUTE, malloc_trim
from slimgpt.solver import CRITERIA, Gram, damp, reconstruct, relative_error

FP64_MAX_COLUMNS = 4096
"""Up to this many columns the solver runs in fp64: it costs little there, and fp32 loses digits to damping 0."""


def solver_dtype(n: int, device: torch.device) -> torch.dtype:
    """The type of the Hessian and the solver for ``n`` columns."""
    return torch.float64 if n <= FP64_MAX_COLUMNS and device.type != "mps" else torch.float32


SelectedUnits = Callable[[int, str], Tensor]
"""Gives the kept units of a layer's ``heads`` or ``channels``, sorted, where something else has selected them."""

SelectUnits = Callable[[Tensor, Tensor], tuple[Tensor, int]]
"""From ``W`` and its damped Hessian to the kept units and the number of units."""


def matrix_of(layer: nn.Module, structure: Structure) -> tuple[Tensor, Tensor | None]:
    """The output matrix of a structure, ``(out, n)``, and its bias."""
    linear = layer.get_submodule(structure.output)
    W = cast(Tensor, linear.weight).detach()
    return W.T if structure.transposed else W, cast(Tensor | None, linear.bias)


def gram_for(n: int, run: ExecutionContext, name: str = "gram") -> Gram:
    """Allocate a Gram accumulator; memory-mapped if the placement says so, or for > 4096 columns on a CPU, where it is
    read only a few times.

    Args:
        name: of the file, for several at once.
    """
    dtype = solver_dtype(n, run.device)
    wide = n > FP64_MAX_COLUMNS and run.device.type == "cpu"
    if run.scratch is None or not (wide or run.placement.gram == FILE):
        return Gram(n, run.device, dtype)
    return Gram(n, dtype=dtype, storage=mapped(run.scratch / f"{name}-{run.ranks.rank}", (n, n), dtype))


class LayerPruner:
    """One layer while it is pruned: its state dict, kept units, errors and seconds."""

    def __init__(
        self,
        index: int,
        dense: nn.Module,
        model_config: Any,
        config: PruneConfig,
        run: ExecutionContext,
        inputs: LayerInputs,
        *,
        selected_units: SelectedUnits | None = None,
    ):
        self.index, self.config, self.run, self.model_config = index, config, run, model_config
        self.inputs, self.selected_units = inputs, selected_units
        self.dense_sizes: Sizes = layer_sizes(model_config)[index]
        self.criterion = CRITERIA[config.method]
        self.repair = self.criterion.repair if config.repair is None else config.repair
        # One generator per layer: a run that goes on in the middle draws the same numbers.
        self.generator = torch.Generator().manual_seed((config.seed * 1_000_003 + index) % 2**64)
        self.resumed: PrunedLayer | None = None
        self.replaying = False
        self.expert_groups = 1
        self.experts: ExpertsReport | None = None
        self.kept: dict[str, list[int]] = {}
        self.error: dict[str, float] = {}
        self.seconds: dict[str, float] = {"load": 0.0, "forward": 0.0, "hessian": 0.0, "solver": 0.0}
        self.results: dict[str, ActivationStore] = {}  # outputs of the finished matrices, by the replaced module
        self.wrap_output: dict[tuple[str, int], Callable[[Tensor], Any]] = {}  # by module and batch
        self.parameters = {name for name, _ in dense.named_parameters()}
        self.state: State = dense.state_dict()
        with self.timed("load"):
            self.layer = running_layer(dense, model_config, index, run)

    def drop_attention(self, modules: Sequence[str]) -> None:
        """Take the whole attention out of the layer.

        Args:
            modules: see :func:`slimgpt.models.modeling_slim.skip_attention`.
        """
        skip_attention(self.layer, modules)
        starts = tuple(f"{module}." for module in modules)
        self.state = {name: tensor for name, tensor in self.state.items() if not name.startswith(starts)}
        self.kept["heads"] = []

    def module_inputs(self, number: int, module: str) -> tuple[Any, ...]:
        """The arguments of a module of the layer for one batch."""
        return arguments_of(self.layer, module, lambda: self._run(number))

    def structure_inputs(self, number: int, structure: Structure) -> Tensor:
        """The input of the output matrix for one batch, ``(batch, seq_len, n)``."""
        partial = cast(PartialForward, self._run(number, until=structure.output))
        self.replaced_module = partial.module
        self.wrap_output[partial.module, number] = partial.wrap_output
        return partial.inputs

    def apply_output_matrix(
        self,
        number: int,
        inputs: Tensor,
        columns: Tensor | None,
        W: Tensor,
        bias: Tensor | None,
        results: ActivationStore | None,
    ) -> None:
        """Multiply one batch by the narrow matrix; store the result, or, for the last matrix, finish the batch."""
        result = F.linear(inputs if columns is None else inputs[..., columns], W, bias)
        if results is not None:
            results.put(number, result)
            return
        wrap_output = self.wrap_output.pop((self.replaced_module, number))
        self.finish_batch(number, {self.replaced_module: wrap_output(result)})

    def finish_batch(self, number: int, result: dict[str, Any] | None = None) -> None:
        """Run one batch through the rest of the layer and store its output."""
        after = self._run(number, result)
        check_finite_output(self.index, after)
        self.inputs.hidden.put(number, after)

    def _run(self, number: int, result: dict[str, Any] | None = None, until: str | None = None) -> Any:
        """Run one batch through the layer with the stored results of the finished matrices."""
        outputs = {name: self.wrap_output[name, number](store.get(number)) for name, store in self.results.items()}
        arguments = self.inputs.arguments[number][self.index]
        return run_with(self.layer, {**outputs, **(result or {})}, self.inputs.hidden.get(number), arguments, until)

    def store_at(self, place: str) -> ActivationStore | None:
        return None if place == RECOMPUTE else ActivationStore(place, self.run.device, self.run.scratch)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a block to a part, with the device synchronised."""
        start = time.perf_counter()
        yield
        self.seconds[part] += synchronized_time(self.run.device) - start

    def to_compute(self, tensor: Tensor) -> Tensor:
        """A tensor on the device and in the dtype of the forward passes."""
        return to_compute(tensor, self.run)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of small sums."""
        return solver_dtype(1, self.run.device)

    def gram(self, n: int, number: int = 0) -> Gram:
        """A Gram accumulator; see :func:`gram_for`.

        Args:
            number: among several at once.
        """
        return gram_for(n, self.run, f"gram-{number}" if number else "gram")

    def select_and_repair(
        self, name: str, structure: Structure, W: Tensor, gram: Gram | None, sizes: Sizes, target: Sizes
    ) -> tuple[Tensor | None, Tensor]:
        """The kept columns (``None``: all) and the narrow matrix in the dtype of the forward passes.

        Rank 0 takes both from an earlier run or from the solver, the others from rank 0.
        """
        units, keep = structure.units(sizes), structure.units(target)
        if keep == units:
            self.kept[name], self.error[name] = list(range(units)), 0.0
            return None, W
        stored = output_matrix(self.state, structure)
        out, n = stored.shape
        ranks, device = self.run.ranks, self.run.device
        if not ranks.main:
            kept = torch.empty(keep, dtype=torch.long)
            W_kept = torch.empty(out, n // units * keep, dtype=stored.dtype, device=device)
        elif self.resumed is not None:
            kept = torch.tensor(self.resumed.report.kept[name])
            # Copied: products may differ in the last bit with where in memory their factors begin.
            W_kept = output_matrix(self.resumed.state, structure).to(device, copy=True)
        else:
            assert gram is not None
            choose = self._choice(name, structure, sizes, keep)
            kept, W_kept = self.solve(structure.output, stored.to(device), gram, choose)
            self.error[name] = self.solved[0]
        kept = ranks.broadcast(kept.to(device)).cpu()
        W_kept = ranks.broadcast(W_kept.contiguous())  # the solver leaves it in column order, a file holds rows
        self.kept[name] = kept.tolist()
        self.state = slice_state(self.state, structure, sizes, kept, W_kept)
        return unit_rows(n, units, kept).to(device), W_kept.to(W.dtype)

    def channels(self, keep: int) -> SelectUnits:
        """The method's choice of so many channels."""
        return lambda W, H: (self.criterion.channels(W, H, keep, self.generator), W.shape[1])

    def _choice(self, name: str, structure: Structure, sizes: Sizes, keep: int) -> SelectUnits:
        """The units that the caller has chosen, or the method's choice."""
        units, groups, chosen = structure.units(sizes), structure.group_count(sizes), self.selected_units
        if chosen is not None:
            return lambda *_: (chosen(self.index, name), units)
        if name != "heads":
            return self.channels(keep)
        return lambda W, H: (self.criterion.heads(W, H, units, keep, groups, self.generator), units)

    def solve(self, matrix: str, stored: Tensor, gram: Gram, choose: SelectUnits) -> tuple[Tensor, Tensor]:
        """The kept units and the repaired matrix ``(out, columns)`` in the stored type.

        Afterwards ``solved`` holds the relative error, and the mean energy of the dense output.
        """
        location = f"layer {self.index}, {matrix}"
        n = stored.shape[1]
        dtype = solver_dtype(n, stored.device)
        malloc_trim()
        H = gram.mean()
        if not bool(torch.isfinite(H.sum())):
            raise NumericalError(f"{location}: its inputs hold NaN or infinity on the calibration text")
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
            malloc_trim()
            G = W @ H
            W_kept = reconstruct(G, H, columns) if self.repair else W[:, columns]
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise NumericalError(
                f"{location}: the Hessian is not positive definite with damping {self.config.damping:g}; "
                "raise --damping (0.01 is usual) or give more calibration tokens"
            ) from error
        G -= W * (H.diagonal() - undamped)
        H.diagonal().copy_(undamped)
        self.solved = (relative_error(W, W_kept, H, columns, G), float((G * W).sum()))
        return kept, W_kept.to(stored.dtype)
