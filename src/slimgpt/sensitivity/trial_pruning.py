"""Trials of plans: each is pruned on few windows, and its predictions are judged on others.

A plan whose whole experts go has no path from the dense matrices to the narrow ones, since the router sends tokens
elsewhere; its layers are run as they are. They are compared as they come, so that memory holds one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimgpt.config import PruneConfig
from slimgpt.layerwise.capture import capture, run_layer
from slimgpt.layerwise.context import ExecutionContext, running_layer, to_compute
from slimgpt.layerwise.divergence import kl_and_cross_entropy, on_device
from slimgpt.layerwise.passes import LayerPasses, LayerVariant
from slimgpt.models.build import decoder_layers, rebuild_layer
from slimgpt.models.lookup import layer_sizes
from slimgpt.planning.plan import Plan
from slimgpt.pruning.loop import prune_layers
from slimgpt.runtime.activation_store import ActivationStore
from slimgpt.runtime.memory import DEVICE, malloc_trim
from slimgpt.sensitivity.windows import split_windows


class TrialLoss(NamedTuple):
    """The loss of a pruned model, on windows that no repair has seen, in nats per token.

    Args:
        divergence: ``KL(dense || pruned)``.
        cross_entropy: of its predictions with the text.
    """

    divergence: float
    cross_entropy: float


class TrialPruning:
    """The losses of plans, each pruned on a small part of the windows.

    Args:
        model: gives embeddings, final norm and LM head; unchanged.
        load_layer: gives the dense layer of an index.
        windows: ``(num_samples, seq_len)`` long, the same in all processes; predictions are compared on the last ones.
        run: its processes divide the windows, of which there are enough (see :mod:`slimgpt.sensitivity.windows`).
        on_layer: called after every layer of every trial.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        load_layer: Callable[[int], nn.Module],
        windows: Tensor,
        config: PruneConfig,
        run: ExecutionContext,
        on_layer: Callable[[], None] = lambda: None,
    ):
        self.model, self.layers, self.load_layer = model, decoder_layers(model), load_layer
        self.config, self.run, self.on_layer = config, run, on_layer
        fit, probe = split_windows(windows, max(max(sizes.values()) for sizes in layer_sizes(model.config)))
        self.tokens, self.predicted = (max(len(probe) * (probe.shape[1] - n), 1) for n in (1, 2))
        self.fit, self.probe = run.ranks.share(fit), run.ranks.share(probe)
        self.dense: ActivationStore | None = None  # hidden states behind the last dense layer, once they are there

    def __call__(self, plan: Plan) -> TrialLoss:
        """The losses of a plan, the same in every process; those of a window's first token are left out.

        Raises:
            NumericalError: NaN or infinity on the way, or a Hessian that is not positive definite.
        """
        slim = ActivationStore(DEVICE, self.run.device)
        inputs = capture(self.model, self.layers, self.probe, self.config.batch_size, slim, self.run.dtype)
        batches = range(len(inputs))
        first = self.dense is None
        dense = ActivationStore(DEVICE, self.run.device) if self.dense is None else self.dense
        for number in batches if first else ():
            dense.put(number, slim.get(number))

        @torch.no_grad()
        def load(index: int) -> nn.Module:
            layer = self.load_layer(index)
            if first:  # the dense model goes along with the first trial
                running = running_layer(layer, self.model.config, index, self.run)
                for number in batches:
                    dense.put(number, run_layer(running, dense.get(number), inputs.arguments[number][index]))
            return layer

        pruned = prune_layers(self.model, load, self.fit, plan, self.config, self.run)

        def variants(index: int, _paths: Sequence[int]) -> Iterator[LayerVariant]:
            state = {name: to_compute(tensor, self.run) for name, tensor in next(pruned).state.items()}
            sizes = plan.layers[index]
            layer = rebuild_layer(self.layers[index], self.model.config, index, state, sizes)
            yield LayerVariant(layer.to(self.run.device), [])

        passes = LayerPasses(variants, inputs.arguments, batches, self.run)
        for _ in passes.forward([slim], checked=batches):
            malloc_trim()
            self.on_layer()
        passes.check_finite()
        next(pruned, None)  # it lets go of the last layer
        self.dense, sums = dense, [0.0, 0.0]
        with on_device(self.model, self.run.device):
            for number, ids in enumerate(self.probe.split(self.config.batch_size)):
                states = [slim.get(number)]
                kls, texts, _ = kl_and_cross_entropy(
                    self.model, dense.get(number), states, ids, passes.tuple_length, [False]
                )
                sums = [sums[0] + float(kls), sums[1] + float(texts)]
        kl, text = self.run.ranks.sums(sums)
        return TrialLoss(kl / self.tokens, text / self.predicted)
