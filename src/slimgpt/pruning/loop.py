"""The loop: layer by layer, attention before FFN, each on the outputs of the layers already pruned.

Every matrix is multiplied once per token. Attention runs once and the inputs of its output matrix are kept; the
pruned matrix turns them into the attention's result. The gate and up matrices run once on that, and their output
meets the pruned down matrix. So a layer costs less than one dense forward pass, plus two Gram matrices and the
solver. A layer that was pruned by an earlier run goes through the same code with its matrices given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.capture import capture
from slimgpt.layerwise.context import ExecutionContext
from slimgpt.models.architecture import HEADS, Sizes, Structure
from slimgpt.models.build import architecture_of, decoder_layers
from slimgpt.models.families.moe import Experts, Mixture
from slimgpt.models.lookup import layer_sizes, text_config
from slimgpt.models.parameter_counts import count
from slimgpt.models.slicing import State
from slimgpt.planning.plan import Plan
from slimgpt.pruning.experts import ExpertsPruner
from slimgpt.pruning.layer import LayerPruner, SelectedUnits, matrix_of
from slimgpt.pruning.report import LayerReport, PrunedLayer
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import malloc_trim

FinishedLayers = Callable[[int], PrunedLayer | None]
"""A layer by index that an earlier run has finished, or ``None``."""


@torch.no_grad()
def prune_layers(
    model: PreTrainedModel,
    load_layer: Callable[[int], nn.Module],
    windows: Tensor,
    plan: Plan,
    config: PruneConfig,
    run: ExecutionContext,
    finished_layers: FinishedLayers = lambda _: None,
    *,
    selected_units: SelectedUnits | None = None,
) -> Iterator[PrunedLayer]:
    """Prune layer after layer; the model itself is not changed.

    Args:
        model: gives embeddings, final norm and LM head (its own layers may have no storage).
        load_layer: gives the dense layer of an index, on any device.
        windows: ``(num_samples, seq_len)`` long, the calibration tokens of this process.
        plan: the widths to reach.
        finished_layers: the layers that an earlier run has finished, by index.
        selected_units: replaces the criterion; its selection is repaired as the settings say.

    Raises:
        NumericalError: NaN or infinity in activations, or a Hessian that is not positive definite.
    """
    architecture = architecture_of(model.config, model)
    structures = architecture.chosen(plan.head_unit)
    layers = decoder_layers(model)
    hidden = ActivationStore(run.placement.stream, run.device, run.scratch)
    inputs = capture(model, layers, windows, config.batch_size, hidden, run.dtype)
    for index, (sizes, target) in enumerate(zip(layer_sizes(model.config), plan.layers, strict=True)):
        dense = load_layer(index)
        work = LayerPruner(index, dense, model.config, config, run, inputs, selected_units=selected_units)
        # All processes go the same way, though only rank 0 sees the journal.
        resumed = finished_layers(index) if run.ranks.main else None
        work.resumed = resumed
        work.replaying = bool(run.ranks.agree(int(resumed is not None)))
        if isinstance(architecture, Mixture):
            work.expert_groups = architecture.groups_of_experts(text_config(model.config))
        state = _prune_structures(work, structures, sizes, target, architecture.attention)
        if resumed is not None:
            yield resumed
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
        finished = PrunedLayer(report, {name: tensor.to("cpu") for name, tensor in state.items()})
        del work, dense, state  # the next layer is not to be worked on beside this one
        yield finished
        del finished
        malloc_trim()


def _prune_structures(
    work: LayerPruner, structures: Sequence[Structure], sizes: Sizes, target: Sizes, attention: Sequence[str]
) -> State:
    """The state dict of the narrower layer in its stored type; the inputs of the next layer replace this one's.

    Args:
        attention: what goes with the whole attention of a layer; see :class:`slimgpt.models.architecture.Architecture`.
    """
    batches = range(len(work.inputs))
    if sizes[HEADS] and not target[HEADS]:
        work.drop_attention(attention)
    structures = [structure for structure in structures if structure.key in work.state]
    if not structures:
        with work.timed("forward"):
            for number in batches:
                work.finish_batch(number)
    for structure in structures:
        last = structure is structures[-1]
        if isinstance(structure, Experts):
            _prune_experts(work, structure, sizes, target, last)
            continue
        name = structure.name
        W, bias = matrix_of(work.layer, structure)
        results = cast(ActivationStore, work.store_at(work.run.placement.stream))
        out = None if last else results
        if work.replaying or structure.units(target) == structure.units(sizes):
            columns, W = work.select_and_repair(name, structure, W, None, sizes, target)
            with work.timed("forward"):
                for number in batches:
                    work.apply_output_matrix(number, work.structure_inputs(number, structure), columns, W, bias, out)
        else:
            gram, kept = work.gram(W.shape[1]), work.store_at(work.run.placement.kept)
            for number in batches:
                with work.timed("forward"):
                    inputs = work.structure_inputs(number, structure)
                with work.timed("hessian"):
                    gram.add(inputs)
                if kept is not None:
                    kept.put(number, inputs)
                del inputs
            with work.timed("hessian"):
                work.run.ranks.reduce(gram)
            with work.timed("solver"):
                columns, W = work.select_and_repair(name, structure, W, gram, sizes, target)
                del gram
            with work.timed("forward"):
                for number in batches:
                    inputs = kept.take(number) if kept is not None else work.structure_inputs(number, structure)
                    work.apply_output_matrix(number, inputs, columns, W, bias, out)
        work.results[work.replaced_module] = results
        sizes = structure.shrink(sizes, structure.units(target))
    return work.state


def _prune_experts(work: LayerPruner, experts: Experts, sizes: Sizes, target: Sizes, last: bool) -> None:
    pruner = ExpertsPruner(work, experts, sizes, work.expert_groups)
    outputs = pruner.prune(target)
    for number in range(len(work.inputs)):
        work.wrap_output[experts.module, number] = pruner.returned
        if last:
            with work.timed("forward"):
                work.finish_batch(number, {experts.module: pruner.returned(outputs.take(number))})
    if not last:
        work.results[experts.module] = outputs
