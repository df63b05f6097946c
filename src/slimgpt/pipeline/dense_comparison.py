"""Divergence of the pruned model from the dense one, measured while both pass by layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from slimgpt.calibration.evaluation_text import EvaluationText
from slimgpt.calibration.windows import digest
from slimgpt.errors import NumericalError
from slimgpt.evaluation.divergence import Divergence
from slimgpt.layerwise.capture import capture, run_layer
from slimgpt.layerwise.context import ExecutionContext, activation_store_for, running_layer
from slimgpt.layerwise.divergence import on_device, predicted_tokens
from slimgpt.layerwise.passes import LayerPasses, LayerVariant
from slimgpt.layerwise.shared_states import arguments_width, stream_width
from slimgpt.losses.chunked import TokenDivergence
from slimgpt.models.build import decoder_layers
from slimgpt.planning.plan import Plan
from slimgpt.runtime.devices import dtype_name
from slimgpt.runtime.memory import malloc_trim


class DenseComparison:
    """The predictions of the dense and the pruned model on a few windows.

    The dense model's hidden states go along while its layers are loaded to be pruned, so that no layer is read twice;
    the pruned layers get a pass of their own once they are final. Activations of the calibration are not touched.

    Args:
        model: gives embeddings, final norm and LM head; unchanged.
        texts: the windows by name; all have the same length.
        batch_tokens: tokens that go through a layer together.
        run: the context of the pruning; its processes divide the windows.
    """

    def __init__(
        self, model: PreTrainedModel, texts: Mapping[str, EvaluationText], batch_tokens: int, run: ExecutionContext
    ):
        start = time.perf_counter()
        self.model, self.texts, self.run = model, texts, run
        self.all_windows = torch.cat([text.windows for text in texts.values()])
        self.windows = self.all_windows[run.ranks.rows(len(self.all_windows))]
        self.batch_size = max(batch_tokens // self.windows.shape[1], 1)
        embedding = next(model.get_input_embeddings().parameters())
        widths = (stream_width(model.config) + arguments_width(model.config), stream_width(model.config))
        each = self.windows.numel() * embedding.element_size()
        hidden, self.dense = (activation_store_for(self.run, each * width) for width in widths)
        self.batches = self.windows.split(self.batch_size) if len(self.windows) else ()
        sizes = list(map(len, self.batches))
        self.inputs = capture(model, decoder_layers(model), self.windows, sizes, hidden, run.dtype)
        for number in range(len(self.inputs)):
            self.dense.put(number, hidden.get(number))
        self.seconds = time.perf_counter() - start

    def with_dense_pass(self, load_layer: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
        """``load_layer``, called once per layer in order, which takes the dense hidden states through every layer."""

        def load(index: int) -> nn.Module:
            layer, start = load_layer(index), time.perf_counter()
            self._dense_pass(layer, index)
            self.seconds += time.perf_counter() - start
            return layer

        return load

    @torch.no_grad()
    def _dense_pass(self, layer: nn.Module, index: int) -> None:
        running = running_layer(layer, self.model.config, index, self.run)
        for number, arguments in enumerate(self.inputs.arguments):
            self.dense.put(number, run_layer(running, self.dense.get(number), arguments[index]))

    def _gathered(self, pieces: Sequence[TokenDivergence]) -> TokenDivergence:
        """The comparisons of all processes, ``(windows, seq_len - 1)`` each; whole in the first one."""
        parts = [torch.cat(part).float() for part in zip(*pieces, strict=True)] or [torch.empty(0)] * 4
        table = torch.stack(parts, -1).view(len(self.windows), self.all_windows.shape[1] - 1, len(parts))
        if self.run.ranks.main and self.run.ranks.world > 1:
            table = torch.cat([table, table.new_empty(len(self.all_windows) - len(table), *table.shape[1:])])
        self.run.ranks.gather_rows(table)
        kl, teacher_log_p, student_log_p, same_top = table.unbind(-1)
        return TokenDivergence(kl, teacher_log_p, student_log_p, same_top.bool())

    def __call__(
        self,
        slim_layer: Callable[[int], nn.Module],
        plan: Plan,
        on_compared: Callable[[int, int, float], None] | None = None,
    ) -> dict[str, Any]:
        """Run the pruned layers and compare; what a report says of it.

        Args:
            slim_layer: gives the final layer of an index.
            plan: its widths.
            on_compared: called in the first process after every step, a layer or a batch of predictions, with its
                number, the number of all steps and the seconds it took.
        """
        start = last = time.perf_counter()
        steps = len(plan.layers) + len(self.inputs)

        def step(number: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if on_compared is not None and self.run.ranks.main:
                on_compared(number, steps, now - last)
            last = now

        def variants(index: int, _paths: Sequence[int]) -> Iterator[LayerVariant]:
            layer = running_layer(slim_layer(index), self.model.config, index, self.run, plan.layers[index])
            yield LayerVariant(layer, [])

        batches, count = range(len(self.inputs)), len(plan.layers)
        passes = LayerPasses(variants, self.inputs.arguments, batches, self.run, num_layers=count)
        for index in passes.forward([self.inputs.hidden]):
            malloc_trim()
            step(index)
        pieces = []
        with on_device(self.model, self.run.device, self.run.dtype):
            for number, ids in enumerate(self.batches):
                dense, slim = (store.get(number) for store in (self.dense, self.inputs.hidden))
                pieces.append(predicted_tokens(self.model, dense, slim, ids, passes.tuple_length))
                step(len(plan.layers) + number)
        tokens = self._gathered(pieces)
        if not self.run.ranks.main:
            return {}
        values, first = {}, 0
        for name, text in self.texts.items():
            end = first + len(text.windows)
            values[name] = _values(text, TokenDivergence(*(part[first:end].flatten() for part in tokens)))
            first = end
        dtype = self.run.dtype or next(self.model.get_input_embeddings().parameters()).dtype
        self.seconds += time.perf_counter() - start
        return {**values, "dtype": dtype_name(dtype), "seconds": self.seconds}


def _values(text: EvaluationText, tokens: TokenDivergence) -> dict[str, Any]:
    """The entry of one text in a report; without figures where a model predicts NaN or infinity."""
    count, window = text.windows.shape
    values: dict[str, Any] = {
        "source": text.source,
        "windows": count,
        "window": window,
        "tokens": count * (window - 1),
        "sha256": digest(text.windows),
    }
    positions = torch.arange(1, window).repeat(count)
    try:
        divergence = Divergence.of(tokens, positions, "the dense model", text.tokens_per_byte)
    except NumericalError:  # the folder is worth having: another type may do
        return values
    return {
        **values,
        "kl": {
            "mean": divergence.kl.mean,
            "stderr": divergence.kl.stderr,
            "median": divergence.kl.median,
            "99%": divergence.kl.quantiles["99%"],
        },
        "bits_per_byte": divergence.bits_per_byte,
        "same_top": divergence.same_top,
        "same_top_stderr": divergence.same_top_stderr,
        "perplexity": {
            "before": divergence.base_perplexity,
            "after": divergence.base_perplexity * math.exp(min(divergence.log_perplexity_ratio, 700.0)),
        },
    }
