"""The stages of a run on tensors without storage: shapes, bytes, messages and operations are counted, nothing is
multiplied.

:func:`simulate` runs :func:`slimgpt.pipeline.stages.run_stages` on the meta device as one of any number of processes.
What the code asks of a number is answered by a constant, what it asks of other processes by this process's own tensors,
and tokens fall to experts in equal parts. :func:`counted` counts the messages of real processes in the same way, so
that the two can be compared (tests/benchmarks/test_simulation.py).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedConfig, PreTrainedModel

from slimgpt.calibration.evaluation_text import EvaluationText
from slimgpt.config import PruneConfig
from slimgpt.distillation.schedule import pruning_split, tokens_to_distill
from slimgpt.models.build import decoder_layers, empty_layer, empty_model, rebuild_layer
from slimgpt.models.parameter_counts import describe
from slimgpt.models.slicing import State
from slimgpt.pipeline.callbacks import Callbacks
from slimgpt.pipeline.memory_sink import LayersInMemory
from slimgpt.pipeline.stages import MeasuredPlan, PruneJob, run_stages
from slimgpt.planning.plan import Plan
from slimgpt.planning.planner import plan_for
from slimgpt.pruning import layer as pruning_layer
from slimgpt.pruning.memory_estimate import memory_need
from slimgpt.pruning.report import PrunedLayer, PruneReport
from slimgpt.runtime import row_shards
from slimgpt.runtime.distributed import Ranks
from slimgpt.runtime.memory import MemoryRequirement
from slimgpt.solver import Gram

STAGES = ("measuring", "loop", "teacher", "training", "comparison")
UNLIMITED = 1 << 60
"""Bytes: everything stays on the device."""

aten = torch.ops.aten


@dataclass
class Message:
    """A collective operation: its kind, the bytes of the tensor that the process hands over, and the stage."""

    kind: str
    bytes: int
    stage: str


@dataclass
class Counts:
    """Everything that was counted in one process.

    Args:
        messages: in their order.
        operations: floating-point operations by stage and part: ``forward`` (with the way back), ``gram``, ``solver``.
        peak: most bytes of tensors on the device at once, by stage.
        waits: how often the host asked for numbers of the device, by stage.
        stage: the one that goes on.
    """

    messages: list[Message] = field(default_factory=list)
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    stage: str = "loop"
    part: str = "forward"
    need: MemoryRequirement | None = None

    def bytes_of(self, stage: str) -> int:
        """Bytes of all messages of a stage."""
        return sum(message.bytes for message in self.messages if message.stage == stage)


# Messages


class _Done:
    """The handle of an operation that is over."""

    def wait(self) -> None:
        """Nothing is left to wait for."""


@contextmanager
def counted(counts: Counts, ranks: Ranks | None = None) -> Iterator[None]:
    """Context manager: count all collective operations.

    Args:
        ranks: simulate the others of these processes; by default the operations are real.
    """

    def counting(name: str, size: Callable[..., int], simulated: Callable[..., Any], owner: Any, kind: str) -> Any:
        real = getattr(owner, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            counts.messages.append(Message(kind, size(*args), counts.stage))
            if ranks is None:
                return real(*args, **kwargs)
            return simulated(*args, kwargs.get("group") or ranks)

        return mock.patch.object(owner, name, operation)

    def first(tensor: Tensor, *_: Any) -> int:
        return tensor.nbytes

    def second(_: Any, tensor: Tensor, *__: Any) -> int:
        return tensor.nbytes

    def nothing(*_: Any) -> None:
        return None

    def summed(tensor: Tensor, group: Ranks) -> None:
        if tensor.dtype == torch.long and tensor.shape == (group.world,):  # one number of every process
            tensor.fill_(tensor[group.rank])
        else:
            tensor.mul_(group.world)

    def gathered(tensors: list[Tensor], own: Tensor, _: Any) -> None:
        for tensor in tensors:
            tensor.copy_(own)

    with ExitStack() as stack:
        for name, size, simulated in (
            ("reduce", first, nothing),
            ("all_reduce", first, summed),
            ("broadcast", first, nothing),
            ("send", first, nothing),
            ("recv", first, nothing),
            ("all_gather", second, gathered),
        ):
            stack.enter_context(counting(name, size, simulated, dist, name))
        stack.enter_context(counting("_reduce_scatter", second, lambda *_: _Done(), row_shards, "reduce_scatter"))
        stack.enter_context(counting("_all_gather", first, nothing, row_shards, "all_gather"))
        if ranks is not None:
            groups = lambda numbers, **_: Ranks(ranks.rank, len(numbers))  # noqa: E731
            stack.enter_context(mock.patch.object(dist, "new_group", groups))
            stack.enter_context(mock.patch.object(dist, "get_backend", return_value="gloo"))
        yield


# Operations and bytes


def _cholesky(a: tuple[int, ...], *_: Any, **__: Any) -> int:
    return _batch(a) * a[-1] ** 3 // 3


def _cholesky_inverse(a: tuple[int, ...], *_: Any, **__: Any) -> int:
    return _batch(a) * 2 * a[-1] ** 3 // 3


def _triangular(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    return max(_batch(a), _batch(b)) * a[-1] ** 2 * (b[-1] if b[-2] == a[-1] else b[-2])


def _grouped(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Rows times matrices, of which every row meets one; or, for the gradient of the matrices, the transposed form."""
    return 2 * a[-2] * a[-1] * b[-1]


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
    """The result of the kernel for experts, which without storage refuses types that it takes on a CPU."""
    groups = [] if offs is None or a.ndim + b.ndim > 4 else [len(offs)]
    return a.new_empty(*groups, *a.shape[:-1], b.shape[-1], dtype=kwargs.get("out_dtype") or a.dtype)


def _batch(shape: tuple[int, ...]) -> int:
    return torch.Size(shape[:-2]).numel()


def _added(_: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **__: Any) -> int:
    return 2 * torch.Size(a).numel() * b[-1]


OPERATIONS: dict[Any, Callable[..., int]] = {
    aten.addmm_: _added,
    aten.baddbmm_: _added,
    aten.linalg_cholesky_ex: _cholesky,
    aten.cholesky_inverse: _cholesky_inverse,
    aten.linalg_solve_triangular: _triangular,
    **({aten._grouped_mm: _grouped} if hasattr(aten, "_grouped_mm") else {}),
}


class _Attention(torch.autograd.Function):
    """Causal attention as fused kernels do it, without a matrix of scores: shapes and operations."""

    @staticmethod
    def forward(ctx: Any, counts: Counts, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.counts = counts
        # Half of two products of every query with every key.
        ctx.operations = 2 * query.numel() * key.shape[-2]
        counts.operations[counts.stage, counts.part] += ctx.operations
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        counts = ctx.counts
        counts.operations[counts.stage, counts.part] += 5 * ctx.operations // 2
        query, key, value = ctx.saved_tensors
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class MetaRun(TorchDispatchMode):
    """Answers what has no answer without numbers, and counts operations and bytes of tensors without storage."""

    current: MetaRun

    def __init__(self, counts: Counts, stored: Iterable[Tensor] = ()):
        super().__init__()
        MetaRun.current = self
        self.counts, self.live = counts, 0
        # Storages, with their bytes. What is stored lies in files, of which the device has a layer at a time.
        self.known: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in stored}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            answer = self._answer(func, first, args, kwargs)
            if answer is not None:
                self.counts.waits[self.counts.stage] += 1
                return answer
        packet = func._overloadpacket
        if first is not None and first.is_meta and packet is getattr(aten, "_grouped_mm", None):
            result = _grouped_product(first, *args[1:], **kwargs)
        else:
            result = func(*args, **kwargs)
        count = OPERATIONS.get(packet)
        if count is not None:
            shapes = [each.shape for each in args if isinstance(each, Tensor)]
            self.counts.operations[self.counts.stage, self.counts.part] += count(*shapes)
        elif packet in flop_registry:
            number = flop_registry[packet](*args, **kwargs, out_val=result)
            self.counts.operations[self.counts.stage, self.counts.part] += number
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._track(tensor)
        return result

    def _answer(self, func: Any, first: Tensor, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default:
            # An index is 0, and a count of one number 1.
            return True if first.dtype == torch.bool else 1.0 if first.is_floating_point() else first.ndim
        if func is aten.nonzero.default:  # every one
            return first.new_empty(first.numel(), first.ndim, dtype=torch.long)
        if func is aten.isnan.default:  # of none, and on the host at once
            return torch.zeros(first.shape, dtype=torch.bool)
        if func is aten.bincount.default:
            bins = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            size, more = divmod(first.numel(), bins)
            return torch.tensor([size + (number < more) for number in range(bins)])
        device = kwargs.get("device")
        if func is aten._to_copy.default and device is not None and torch.device(device).type == "cpu":
            dtype = kwargs.get("dtype") or first.dtype
            if first.ndim == 1 and not dtype.is_floating_point and dtype != torch.bool:
                return torch.arange(len(first), dtype=dtype)
            # One number stands for all: a weight that is moved to the host takes no memory here.
            return torch.full((), dtype == torch.bool, dtype=dtype).expand(first.shape)
        return None

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.counts.peak[self.counts.stage] = max(self.counts.peak[self.counts.stage], self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


@contextmanager
def _parts(counts: Counts) -> Iterator[None]:
    """Context manager: operations of Gram matrices and of the solver count as such, and choices of units, which have no
    numbers to choose by, take the first ones."""

    def as_part(owner: Any, name: str, part: str) -> Any:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, counts.part = counts.part, part
            try:
                return real(*args, **kwargs)
            finally:
                counts.part = before

        return mock.patch.object(owner, name, wrapped)

    def choosing(criterion: Any) -> Any:
        def heads(W: Tensor, H: Tensor, units: int, keep: int, *rest: Any) -> Tensor:
            return criterion.heads(W, H, units, keep, *rest)[:keep]

        def channels(W: Tensor, H: Tensor, keep: int, *rest: Any) -> Tensor:
            return criterion.channels(W, H, keep, *rest)[:keep]

        return replace(criterion, heads=heads, channels=channels)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(counts, query, key, value)

    criteria = {name: choosing(criterion) for name, criterion in pruning_layer.CRITERIA.items()}
    with (
        as_part(Gram, "add", "gram"),
        as_part(pruning_layer.LayerPruner, "solve", "solver"),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.dict(pruning_layer.CRITERIA, criteria),
    ):
        yield


# Runs


class StagedLayers(LayersInMemory):
    """A model in memory whose pruned layers are kept beside it in every process, as the journal's folder lets all of
    them have; tells which stage goes on.

    Args:
        plan: the widths that the loop prunes to, whatever the measuring gave; ``None``: those.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks, counts: Counts, plan: Plan | None = None):
        super().__init__(model)
        self.readers = ranks
        self.counts, self.plan = counts, plan

    def check_finite(self, ranks: Ranks) -> None:
        """Weights without storage have no numbers."""

    def write(self, layer: PrunedLayer) -> None:
        """Keep a layer as its shapes say: on the host, which has the journal's files, it would take memory here."""
        index, sizes = layer.report.layer, layer.report.sizes
        if not next(self.model.parameters()).is_meta:
            super().write(layer)
            return
        dense = decoder_layers(self.model)[index]
        state = {name: tensor.new_zeros(()).expand(tensor.shape) for name, tensor in layer.state.items()}
        self.pruned.append(rebuild_layer(dense, self.model.config, index, state, sizes))

    def measured_plan(self, measure: Callable[[], MeasuredPlan]) -> MeasuredPlan:
        self.counts.stage = "measuring"
        plan, info = measure()
        self.counts.stage = "loop"
        return self.plan or plan, info

    def slim_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        self.counts.stage = "teacher"
        if not self.readers.main:
            self._stand_ins(plan)
        return super().slim_layers(plan)

    def training_state(self) -> State | None:
        self.counts.stage = "training"
        return super().training_state()

    def final_layers(self, plan: Plan) -> Callable[[int], nn.Module]:
        self.counts.stage = "comparison"
        return super().slim_layers(plan)

    def _stand_ins(self, plan: Plan) -> None:
        """Layers of the right shapes where only the first process has the pruned ones, which others read from disk."""
        for index, (dense, sizes) in enumerate(zip(decoder_layers(self.model), plan.layers, strict=True)):
            shapes = empty_layer(dense, self.model.config, index, sizes).state_dict()
            like = next(dense.parameters())
            state = {name: torch.full_like(tensor, 0.01, device=like.device) for name, tensor in shapes.items()}
            state = {name: tensor.to(like.dtype) for name, tensor in state.items()}
            self.pruned.append(rebuild_layer(dense, self.model.config, index, state, sizes))


def empty_model_of(model_config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model without storage, its buffers included."""
    model: Any = empty_model(model_config)
    model.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to("meta")
    return model


def make_job(model: PreTrainedModel, config: PruneConfig, windows: Tensor, held_out: int = 0) -> PruneJob:
    """Input of the stages for a model, with given text.

    Args:
        held_out: windows that the result is compared with the dense model on.
    """
    device, stored = model.device, next(model.parameters()).dtype
    shape = describe(model.config, model)
    plan = plan_for(model.config, config, shape)
    text = EvaluationText("given", windows[:held_out], 1.0)
    return PruneJob(
        name="simulated",
        config=config,
        shape=shape,
        plan=plan,
        windows=windows,
        calibration="given",
        device=device,
        stored=stored,
        dtype=None,
        copied=True,
        distill_tokens=tokens_to_distill(config, plan, windows),
        evaluation={"calibration": text} if held_out else {},
    )


def run(
    model: PreTrainedModel, job: PruneJob, ranks: Ranks, counts: Counts, plan: Plan | None = None
) -> tuple[PruneReport, StagedLayers]:
    """One process's part of a run that keeps everything in memory.

    Args:
        plan: see :class:`StagedLayers`.
    """
    layers = StagedLayers(model, ranks, counts, plan)
    return run_stages(job, layers, layers, Callbacks(), ranks, UNLIMITED), layers


def simulate(
    model_config: PreTrainedConfig,
    config: PruneConfig,
    windows: Tensor,
    ranks: Ranks,
    dtype: torch.dtype = torch.bfloat16,
    *,
    held_out: int = 0,
    plan: Plan | None = None,
) -> Counts:
    """Run the stages without numbers as one of several processes.

    Args:
        model_config: the dense model's.
        windows: token ids ``(num_samples, seq_len)``; only their number counts.
        dtype: of the weights.
        held_out: see :func:`make_job`.
        plan: see :class:`StagedLayers`.
    """
    counts = Counts()
    model = empty_model_of(model_config, dtype)
    job = make_job(model, config, windows, held_out)
    own = ranks.share(pruning_split(windows, job.distill_tokens))
    counts.need = memory_need(model, own, job.plan, config, None, True, processes=ranks.world)
    with counted(counts, ranks), _parts(counts), MetaRun(counts, model.state_dict().values()):
        run(model, job, ranks, counts, plan)
    return counts
