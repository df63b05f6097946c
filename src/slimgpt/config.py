"""The settings of a run, checked before anything long begins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from slimgpt.errors import UsageError
from slimgpt.solver import CRITERIA

ALLOCATIONS = ("auto", "schedule", "sensitivity", "search")


@dataclass(frozen=True)
class PruneConfig:
    """How to prune.

    Args:
        ratio: the share of the decoder layers' parameters to remove, in (0, 1); ``None`` means 0.2, or the mean
            of a listed schedule.
        schedule: a strategy by name or one ratio per layer; ``None`` means ``log_increase`` (``uniform`` for a
            uniform model).
        method: a key of ``slimgpt.solver.CRITERIA``.
        repair: solve for the weights that stay; ``None`` means as the method's authors do.
        head_unit: ``auto``, ``kv`` or ``query``.
        num_samples: calibration windows.
        seq_len: tokens per window.
        batch_size: windows that go through a layer together.
        damping: ``percdamp``, the share of the mean diagonal added to the Hessian's diagonal.
        seed: for the choice of text and the ``random`` method.
        round_to: every FFN width becomes a multiple of it.
        uniform: the same widths in all layers.
        forward_dtype: of the forward passes over the calibration tokens; ``auto``, ``float32``, ``float16`` or
            ``bfloat16``. Weights are scored, repaired and saved in their own type whatever it is.
        params: parameters that the whole model may have, such as ``1.0B``; in place of ``ratio``.
        bytes: bytes that its weights may take on disk, such as ``800MB``; in place of ``ratio``.
        kv_cache: what its KV cache may take at a context, such as ``1GB@32k``.
        whole_experts: in a mixture of experts, the share of what its experts lose that is taken as whole experts, in
            [0, 1]; the rest is channels inside the experts that stay.
        allocation: ``schedule``: every layer loses what the schedule says; ``sensitivity``: as much goes where it costs
            least by what was measured on a trial run; ``search``: measured at more points and compared with the
            schedule's plan, and the training afterwards is eight times as long and moves all matrices. ``auto``:
            ``sensitivity`` for the method ``slimgpt`` where there are enough calibration tokens, and ``schedule`` for
            the others and wherever a schedule, a plan or equal widths were asked for.
        plan: a file of widths that ``slimgpt plan --save`` wrote; in place of every other choice of widths.
        distill: on how many calibration tokens output matrices and norms are trained together after pruning, towards
            what the dense model predicts and the text says; 0 or ``off``: not at all; if more than there are, the dense
            model writes the others. ``auto``: for the method ``slimgpt``, where there are enough, on as many as cost
            1.4 forward passes over all of them (11.5 with ``allocation`` ``search``); on none for the other methods,
            without repair, and for mixtures of experts.

    Raises:
        UsageError: a number outside its range.
    """

    ratio: float | None = None
    schedule: str | tuple[float, ...] | None = None
    method: str = "slimgpt"
    repair: bool | None = None
    head_unit: str = "auto"
    num_samples: int = 128
    seq_len: int = 2048
    batch_size: int = 4
    damping: float = 0.01
    seed: int = 0
    round_to: int = 1
    uniform: bool = False
    forward_dtype: str = "auto"
    params: str | int | None = None
    bytes: str | int | None = None
    kv_cache: str | None = None
    allocation: str = "auto"
    plan: str | None = None
    whole_experts: float = 0.0
    distill: str | int = "auto"

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size", "round_to"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UsageError(f"damping is {self.damping}; it must be 0 or more (the paper uses 0 to 0.01)")
        if not 0 <= self.whole_experts <= 1:
            raise UsageError(f"whole_experts is {self.whole_experts}; it is a share between 0 and 1")
        sizes = [name for name in ("ratio", "params", "bytes", "plan") if getattr(self, name) is not None]
        if len(sizes) > 1:
            raise UsageError(f"{' and '.join(sizes)} were given; each says how small the model shall be: give one")
        unit = self.head_unit != "auto"
        free = (self.schedule, unit, self.kv_cache, self.uniform, self.round_to != 1, self.whole_experts)
        if self.plan is not None and any(free):
            raise UsageError(
                "a plan file says every width; leave out schedule, head_unit, kv_cache, whole_experts, and uniform and "
                "round_to, which engines named with --for may set"
            )
        if self.allocation == "auto":
            measured = self.method == "slimgpt" and not (self.schedule or self.plan or self.uniform)
            if not measured or (self.kv_cache is not None and not sizes):
                object.__setattr__(self, "allocation", "schedule")
        if self.allocation not in ALLOCATIONS:
            raise UsageError(f"allocation '{self.allocation}' is unknown; choose {', '.join(ALLOCATIONS)}")
        if self.allocation in ("sensitivity", "search"):
            if self.schedule or self.plan or self.uniform:
                raise UsageError(
                    f"allocation '{self.allocation}' chooses the widths itself; leave out schedule, plan and uniform"
                )
            if self.kv_cache is not None and not sizes:
                raise UsageError(
                    f"allocation '{self.allocation}' spends a size, and kv_cache alone names none; "
                    "add ratio, params or bytes"
                )
        distill = 0 if self.distill == "off" else self.distill
        if distill == "auto" and (self.method != "slimgpt" or self.repair is False):
            distill = 0
        if distill != "auto":
            try:
                distill = int(distill)
            except ValueError:
                distill = -1
            if distill < 0:
                raise UsageError(f"distill is {self.distill}; it must be auto, off, or a number of tokens")
        object.__setattr__(self, "distill", distill)
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}; it must be 0 or more")


def parse_schedule(text: str | None) -> str | tuple[float, ...] | None:
    """A schedule from the command line: a name, or numbers with commas between them.

    Raises:
        UsageError: a list with something in it that is no number.
    """
    if text is None or "," not in text:
        return text
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"schedule '{text}' is neither a name nor a list of numbers such as 0.1,0.2,0.3") from None


def make_config(**settings: Any) -> PruneConfig:
    """Settings, with the method checked.

    Raises:
        UsageError: a value outside its range or an unknown method.
    """
    schedule = settings.get("schedule")
    if isinstance(schedule, str):
        settings["schedule"] = parse_schedule(schedule)
    elif schedule is not None:
        settings["schedule"] = tuple(schedule)
    config = PruneConfig(**settings)
    if config.method not in CRITERIA:
        raise UsageError(f"method '{config.method}' is unknown; choose {', '.join(CRITERIA)}")
    return config
