"""``slimgpt recover``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from slimgpt.cli.console import app, handle_errors, out, show, silence_libraries
from slimgpt.cli.options import DeviceOption, DtypeOption, TrustOption
from slimgpt.errors import UsageError

if TYPE_CHECKING:
    from slimgpt.recovery.run import Recovery
    from slimgpt.recovery.trainer import Step

LINES = 50
"""Lines that a run prints about its steps where the output is no terminal, about."""


@app.command()
@handle_errors
def recover(
    slim: Annotated[Path, typer.Argument(metavar="SLIM", help="The folder that `slimgpt prune` wrote.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="A .txt, .jsonl, .json or .parquet file, a folder, a datasets id, or 'demo'; more than once for "
            "several. Plain text is packed; of instructions and chats the answers are learned.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(help="lora (adapters, merged), full (the weights), distill (the dense model teaches)."),
    ] = "lora",
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="End after so many updates.")] = None,
    shares: Annotated[
        str | None,
        typer.Option(help="Examples from each source then, in proportion: 4,1.", show_default="the same from each"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest.", show_default="1e-4 for adapters, 5e-4 for weights")
    ] = None,
    schedule: Annotated[str, typer.Option(help="How it falls: cosine, linear, constant.")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the steps over which it rises.")] = 0.05,
    max_length: Annotated[int, typer.Option(help="Tokens of an example.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Examples per update, over all devices.")] = 64,
    micro_batch: Annotated[int, typer.Option(help="Examples at a time on a device.")] = 4,
    rank: Annotated[
        int | None, typer.Option(help="Of the adapters; with distill: train adapters.", show_default="8 with lora")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale of the adapters.", show_default="twice the rank")] = None,
    dropout: Annotated[float, typer.Option(help="On the way into the adapters.")] = 0.0,
    train_embeddings: Annotated[
        bool, typer.Option("--train-embeddings", help="full, distill: train the embeddings too.")
    ] = False,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    pack: Annotated[bool, typer.Option("--pack", help="Pack instructions and chats like plain text.")] = False,
    teacher: Annotated[
        str | None, typer.Option(help="distill: the dense model.", show_default="the one SLIM was made from")
    ] = None,
    distill_weight: Annotated[float, typer.Option(help="distill: weight of the divergence from the teacher.")] = 1.0,
    text_weight: Annotated[float, typer.Option(help="distill: weight of the text's own cross-entropy.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="distill: the teacher's most likely tokens to keep.")] = 64,
    layer_weight: Annotated[float, typer.Option(help="distill: weight of the distance of layer outputs.")] = 0.0,
    layers: Annotated[int, typer.Option(help="distill: layer outputs to compare.")] = 4,
    held_out: Annotated[int, typer.Option(help="Examples to measure on rather than learn; 0: none.")] = 32,
    evaluations: Annotated[int, typer.Option(help="How often to measure and to keep the state, in all.")] = 10,
    patience: Annotated[int, typer.Option(help="Stop after so many measurements without a lower loss; 0: never.")] = 3,
    seed: Annotated[int, typer.Option(help="For the order of the data and the adapters.")] = 0,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="Multiply in bfloat16.", show_default="where it is faster")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice rather than keep them.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a killed run of the same command stopped.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train SLIM to win back what pruning lost, and save the result as the folder OUT.

    Several GPUs: `torchrun --nproc-per-node 8 -m slimgpt recover ...`.
    """
    from slimgpt.recovery.run import recover as run

    silence_libraries()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=out,
    )
    with progress:
        reading = progress.add_task("checking the request and reading the data", total=None)
        tasks = {"teacher": None, "training": None}

        def begin(part: str, description: str) -> None:
            progress.update(reading, visible=False)
            if tasks[part] is None:
                tasks[part] = progress.add_task(description, total=None)  # type: ignore[assignment]

        def on_teacher(done: int, total: int) -> None:
            begin("teacher", "the dense model reads the data")
            progress.update(tasks["teacher"], completed=done, total=total)  # type: ignore[arg-type]

        def on_step(step: Step) -> None:
            begin("training", "training")
            text = _losses(step)
            progress.update(tasks["training"], completed=step.step, total=step.steps, description=text)  # type: ignore[arg-type]
            if not out.is_terminal and (step.step % max(1, step.steps // LINES) == 0 or step.step == step.steps):
                out.print(f"step {step.step}/{step.steps}: {text}", soft_wrap=True)

        recovery = run(
            slim,
            output,
            data,
            teacher=teacher,
            device=device,
            dtype=dtype,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            on_teacher=on_teacher,
            on_step=on_step,
            method=method,
            epochs=epochs,
            max_steps=max_steps,
            shares=_numbers(shares),
            learning_rate=learning_rate,
            schedule=schedule,
            warmup=warmup,
            max_length=max_length,
            batch_size=batch_size,
            micro_batch=micro_batch,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            train_embeddings=train_embeddings,
            weight_decay=weight_decay,
            pack=pack,
            distill_weight=distill_weight,
            text_weight=text_weight,
            top_k=top_k,
            layer_weight=layer_weight,
            layers=layers,
            held_out=held_out,
            evaluations=evaluations,
            patience=patience,
            seed=seed,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
        )
    _print(recovery)


def _numbers(text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"shares '{text}' is no list of numbers such as 4,1") from None


def _losses(step: Step) -> str:
    parts = ["training"]
    parts += [f"loss {step.loss:.3f}"] if step.loss is not None else []
    parts += [f"held out {step.held_out:.3f}"] if step.held_out is not None else []
    return ", ".join(parts)


def _print(recovery: Recovery) -> None:
    """Print the losses before and after, and the folder."""
    curve, seconds = recovery.curve, recovery.seconds
    if curve.held_out:
        first, best = curve.held_out[0][1], min(loss for _, loss in curve.held_out)
        out.print(
            f"held-out loss [bold]{first:.4f}[/] before, [bold]{best:.4f}[/] after "
            f"(step {curve.kept} of {curve.steps} was kept)",
            highlight=False,
        )
    spent = ", ".join(f"{part} {value:,.0f} s" for part, value in seconds.items())
    out.print(
        f"wrote {show(recovery.folder)} ({spent}); the curve is in recovery.json and recovery.png\n"
        f"next: slimgpt evaluate {show(shlex.quote(str(recovery.folder)))} --against BASE --text FILE --update-card",
        soft_wrap=True,
    )
