"""Progress on a terminal, or as lines: phase, count and time left first, so that 80 columns are enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from slimgpt.cli.console import out

if TYPE_CHECKING:
    import torch

    from slimgpt.pipeline.callbacks import Callbacks, OnPhase
    from slimgpt.pruning.report import LayerReport

LINES = 20
"""Lines that a phase prints about its steps where the output is no terminal, about."""

WIDE = 110
"""Columns from which on a bar has room for more than count and time."""


class TimeColumn(ProgressColumn):
    """The time left, and of a finished phase the time it took."""

    def render(self, task: Task) -> Text:
        """``ETA 0:45`` or ``in 1:02``."""
        if task.finished:
            return Text(f"in {duration(task.finished_time or 0)}")
        if task.total is None:  # nobody knows
            return Text("")
        left = task.fields.get("left", task.time_remaining)
        return Text("ETA -:--" if left is None else f"ETA {duration(left)}")


class Phases:
    """The phases of a command, one bar each on a terminal, and some lines each elsewhere."""

    def __init__(self) -> None:
        self.wide = out.width >= WIDE
        self.terminal = out.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TextColumn("{task.fields[count]}", justify="right", table_column=Column(no_wrap=True)),
            TimeColumn(table_column=Column(no_wrap=True, min_width=len("ETA 00:00"))),
            BarColumn(bar_width=None if self.wide else 20),
            TextColumn("{task.fields[state]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=out,
            expand=self.wide,
            disable=not self.terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.started: dict[str, float] = {}

    def step(
        self, phase: str, done: int, total: int | None, *, left: float | None = None, state: str = "", unit: str = ""
    ) -> None:
        """Show a phase at a step.

        Args:
            phase: its name; a name that is new begins a phase.
            total: ``None`` as long as it is not known.
            left: seconds that are left; estimated from the steps so far if not given.
            state: what else is known; the first words of it where columns are few.
            unit: what is counted.
        """
        start = self.started.setdefault(phase, time.perf_counter())
        count = "" if total is None else f"{unit} {done}/{total}".strip()
        if not self.terminal:
            if total is not None and (done == total or done % max(1, total // LINES) == 0) and done:
                rest = (time.perf_counter() - start) / done * (total - done) if left is None else left
                time_text = f"in {duration(time.perf_counter() - start)}" if done == total else f"ETA {duration(rest)}"
                out.print("  ".join(filter(None, (phase, count, time_text, state))), soft_wrap=True, highlight=False)
            return
        if phase not in self.tasks:
            self.tasks[phase] = self.progress.add_task(phase, total=total, count=count, state="")
        fields: dict[str, Any] = {"count": count, "state": state}
        if left is not None:
            fields["left"] = left
        self.progress.update(self.tasks[phase], completed=done, total=total, **fields)


@contextmanager
def phases() -> Iterator[Phases]:
    """The phases of a command while it runs."""
    shown = Phases()
    with shown.progress:
        yield shown


def duration(seconds: float) -> str:
    """Seconds as ``0:45`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def bar(phase: str) -> Iterator[Callable[[int, int], None]]:
    """A command of a single phase: what is called with steps done and steps in all."""
    with phases() as shown:
        yield lambda done, total: shown.step(phase, done, total)


@contextmanager
def count_bar(phase: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar for work whose amount is known only once it starts."""
    with phases() as shown:

        def on_start(total: int) -> Callable[[int], None]:
            count = 0
            shown.step(phase, 0, total)

            def advance(done: int) -> None:
                nonlocal count
                count += done
                shown.step(phase, count, total)

            return advance

        yield on_start


@contextmanager
def layer_progress(tokens: int, device: torch.device) -> Iterator[Callbacks]:
    """Progress of a pruning run; yields the callbacks."""
    from slimgpt.pipeline.callbacks import by_phase

    with phase_progress(tokens, device) as step:
        yield by_phase(step)


@contextmanager
def phase_progress(tokens: int, device: torch.device) -> Iterator[OnPhase]:
    """Progress of one pruning run or several; yields what is called after every step of every phase.

    The time left is that of the layers seen so far times those to come. Layers that a resumed run finds finished
    count with what they took when they were pruned, so the figure is right from the first of them on.
    """
    from slimgpt.pruning.report import LayerReport
    from slimgpt.runtime.memory import used_bytes

    seconds: dict[str, list[float]] = {}
    with phases() as shown:

        def step(phase: str, done: int, total: int, took: float, detail: LayerReport | float | None) -> None:
            each = seconds.setdefault(phase, [])
            each.append(took)
            left, unit, state = sum(each) / len(each) * (total - done), "", ""
            if isinstance(detail, LayerReport):
                unit, state = "layer", f"{used_bytes(device) / 1e9:.2f} GB in use"
                if shown.wide or not shown.terminal:
                    state = f"{tokens / max(took, 1e-9):,.0f} tokens/s  {state}  {_describe(detail)}"
            elif detail is not None:
                state = f"KL {detail:.3f} nats"
            shown.step(phase, done, total, left=left, state=state, unit=unit)

        yield step


def _describe(report: LayerReport) -> str:
    from slimgpt.models.families.moe import ffn_text

    s = report.sizes
    heads = f"{s['num_attention_heads']}/{s['num_key_value_heads']} heads"
    return (
        f"{heads if s['num_attention_heads'] else 'no attention'}, {ffn_text(s)} channels, "
        f"error {report.percent('heads', 1)} / {report.percent('channels', 1)}"
    )
