"""Progress on a terminal, or as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimgpt.cli.console import out

if TYPE_CHECKING:
    import torch

    from slimgpt.pipeline.callbacks import Callbacks
    from slimgpt.planning.plan import Plan
    from slimgpt.pruning.report import LayerReport


@contextmanager
def bar(unit: str) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit} in"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left"), console=out) as progress:
        yield progress, progress.add_task("", total=None)


@contextmanager
def count_bar(unit: str) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """A bar for work whose amount is known only once it starts."""
    with bar(unit) as (progress, task):

        def on_start(total: int) -> Callable[[int], None]:
            progress.update(task, total=total)
            return lambda done: progress.advance(task, done)

        yield on_start


@contextmanager
def layer_progress(tokens: int, device: torch.device) -> Iterator[Callbacks]:
    """Progress of a run: a bar on a terminal, lines otherwise; yields the callbacks.

    The time left is that of the layers seen so far times those to come. Layers that a resumed run finds finished
    count with what they took when they were pruned, so the figure is right from the first of them on.
    """
    from slimgpt.pipeline.callbacks import Callbacks

    seconds: list[float] = []
    measured: list[float] = []
    trained: list[float] = []
    prepare_seconds: dict[str, list[float]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out) if out.is_terminal else nullcontext() as progress:
        task = progress.add_task("", total=None, state="") if progress else None

        def on_layer(report: LayerReport, plan: Plan) -> None:
            from slimgpt.runtime.memory import used_bytes

            seconds.append(sum(report.seconds.values()))
            done, total = report.layer + 1, len(plan.layers)
            state = (
                f"layers, {tokens / max(seconds[-1], 1e-9):,.0f} tokens/s, {used_bytes(device) / 1e9:.2f} GB in use, "
                f"{_left(seconds, total - done)}"
            )
            if progress and task is not None:
                progress.update(task, completed=done, total=total, description=_describe(report), state=state)
            else:
                out.print(f"{_describe(report)}  {done}/{total} {state}", soft_wrap=True)

        def on_step(done: int, total: int, state: str, every: int) -> None:
            if progress and task is not None:
                progress.update(task, completed=done, total=total, description="step", state=state)
            elif done % every == 0 or done == total:
                out.print(f"{done}/{total} steps, {state}", soft_wrap=True)

        def on_measured(step: int, steps: int, took: float) -> None:
            measured.append(took)
            left = _left(measured, steps - len(measured))
            on_step(step + 1, steps, f"measuring what each layer's widths cost, {left}", 10)

        def on_distilled(step: int, steps: int, divergence: float, took: float) -> None:
            trained.append(took)
            state = f"training towards the dense model, divergence {divergence:.3f} nats per token"
            on_step(step + 1, steps, f"{state}, {_left(trained, steps - len(trained))}", 4)

        def on_rehearsed(stage: str, step: int, steps: int, took: float) -> None:
            prepare_seconds.setdefault(stage, []).append(took)
            on_step(step + 1, steps, f"{stage}, {_left(prepare_seconds[stage], steps - step - 1)}", max(steps // 4, 1))

        yield Callbacks(on_layer, on_measured, on_distilled, on_rehearsed)


def _left(seconds: list[float], to_come: int) -> str:
    """The time that what is to come will take if it takes what the others took."""
    return f"about {timedelta(seconds=round(sum(seconds) / len(seconds) * to_come))} left"


def _describe(report: LayerReport) -> str:
    from slimgpt.models.families.moe import ffn_text

    s = report.sizes
    return (
        f"layer {report.layer}: {s['num_attention_heads']}/{s['num_key_value_heads']} heads, "
        f"{ffn_text(s)} channels, error {report.percent('heads', 1)} / {report.percent('channels', 1)}"
    )
